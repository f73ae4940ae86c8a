"""A quantized model against its base: perplexity, KL divergence and agreement of the likeliest tokens, on a text.

Each model runs one decoder layer at a time over all windows, in float32; only hidden states are kept. Their last
ones are compared a slice of the vocabulary at a time. So the peak is one layer, or one slice of both output
projections, beside the hidden states, however deep the models are and however large their vocabulary. On request
the quantized model runs in vLLM instead, whole, as it would serve; its base has been streamed by then.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qtool import memory
from qtool.calibration.text import BUILTIN, Calibration, held_out, load, load_tokenizer
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.evaluate.divergence import Divergence
from qtool.evaluate.intervals import estimate, estimate_quantile
from qtool.model.decoder import DecoderStream
from qtool.model.observe import forward

if TYPE_CHECKING:
    from qtool.workers import Report

_TOKENS = 1024  # in a batch
_ROWS = 4096  # of the output projection, at a time
_PARTS = 192  # that the text is cut into at most, to show where the models differ
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


@torch.no_grad()
def compare(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Compare two checkpoints.

    Job keys: base, quantized (folders), text (builtin or a file), windows, length (tokens), trust_remote_code, runtime
    (None, or "vllm": who runs the quantized model) and engine (vLLM's arguments on this machine).
    Window i is the text's tokens i·length to (i+1)·length - 1; each of its tokens but the first is predicted.

    Returns:
        base_perplexity, quantized_perplexity, perplexity_ratio; kl_divergence (of the quantized from the base, nats
        per token), kl_median, kl_p99; top1_agreement, top5_agreement (the share of the base's five likeliest tokens
        that are among the quantized one's five), each {"value", "low", "high"} with a 95 % confidence interval;
        kl_max, {"value", "window", "position"} of the token where they differ most (a maximum has no such interval);
        kl_along_text, {"tokens", "values"}: means of so many predicted tokens each, in the text's order;
        and base, quantized, text, runtime, seconds, peak_memory_bytes.

    Raises:
        InputError: a checkpoint that can't be run, two that don't belong together, or too little text.
        QtoolError: a model's hidden states are not finite, or vLLM fails.
    """
    started = time.perf_counter()
    trust: bool = job["trust_remote_code"]
    checkpoints = [Checkpoint.open(job["base"]), Checkpoint.open(job["quantized"])]
    base, quantized = (DecoderStream(c, dtype=torch.float32, trust_remote_code=trust) for c in checkpoints)
    _check_pair(base, quantized)
    check_length(base, job["length"])
    text = _text(job, checkpoints)
    targets = text.ids[:, 1:].reshape(-1)
    states = _run(base, text.ids, "base", report)
    if job["runtime"] == "vllm":
        divergence, dtype = _against_vllm(base, states, text.ids, job, report)
    else:
        both = [states, _run(quantized, text.ids, "quantized", report)]
        divergence, dtype = _divergence([base, quantized], both, targets, report), "float32"
    return {
        "base": job["base"],
        "quantized": job["quantized"],
        "text": {
            "source": text.source,
            "sha256": text.digest,
            "windows": text.ids.shape[0],
            "length": text.ids.shape[1],
        },
        "runtime": {"name": job["runtime"] or "qtool", "dtype": dtype},
        **_figures(divergence, text.ids.shape[0]),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": memory.peak(),
    }


def _figures(divergence: Divergence, windows: int) -> dict[str, Any]:
    def by_window(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.double().view(windows, -1)

    def means(tokens: torch.Tensor) -> list[float]:
        return by_window(tokens).mean(dim=1).tolist()

    def share(value: float) -> float:
        return min(1.0, max(0.0, value))

    surprise = [means(side.surprise()) for side in (divergence.base, divergence.other)]
    kl = by_window(divergence.kl().clamp(min=0))  # float32 logits can make nothing a little less than that
    window, position = divmod(int(kl.argmax()), kl.shape[1])
    size = -(-kl.shape[1] // max(1, _PARTS // windows))
    return {
        "base_perplexity": estimate(surprise[0], math.exp),
        "quantized_perplexity": estimate(surprise[1], math.exp),
        "perplexity_ratio": estimate([b - a for a, b in zip(*surprise, strict=True)], math.exp),
        "kl_divergence": estimate(means(kl), lambda value: max(0.0, value)),
        "kl_median": estimate_quantile(kl, 0.5),
        "kl_p99": estimate_quantile(kl, 0.99),
        "kl_max": {"value": float(kl.max()), "window": window, "position": position},
        "top1_agreement": estimate(means(divergence.agreement()), share),
        "top5_agreement": estimate(means(divergence.overlap()), share),
        "kl_along_text": {
            "tokens": size,
            "values": [float(part.mean()) for row in kl for part in row.split(size)],
        },
    }


def _run(stream: DecoderStream, ids: torch.Tensor, name: str, report: Report) -> torch.Tensor:
    """What the output projection will multiply for every token that has a next one: [tokens, hidden]."""
    hidden = list(forward(stream, ids, _TOKENS, name, report))[-1]
    for rows in hidden.split(max(1, _TOKENS // ids.shape[1])):
        rows.copy_(stream.head.normalize(rows))
    return hidden[:, :-1].reshape(-1, hidden.shape[2])


def _divergence(
    streams: list[DecoderStream], states: list[torch.Tensor], targets: torch.Tensor, report: Report
) -> Divergence:
    divergence = Divergence(targets)
    rows = streams[0].head.vocabulary
    for first in range(0, rows, _ROWS):
        report.progress("compare", first, rows, "tokens of the vocabulary")
        parts = [stream.head.rows(first, min(first + _ROWS, rows)) for stream in streams]
        for start in range(0, len(targets), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            both = zip(streams, states, parts, strict=True)
            divergence.add(tokens, first, *(stream.head.logits(state[tokens], part) for stream, state, part in both))
    report.progress("compare", rows, rows, "tokens of the vocabulary")
    return divergence


def _against_vllm(
    base: DecoderStream, states: torch.Tensor, ids: torch.Tensor, job: dict[str, Any], report: Report
) -> tuple[Divergence, str]:
    """The quantized model in vLLM, and the dtype that it computes in."""
    from qtool.evaluate.vllm_logits import VllmLogits

    windows, length = ids.shape
    report.progress("start vLLM", 0, 0)
    config = Checkpoint.open(job["quantized"]).config
    run = VllmLogits(job["quantized"], config, length, job["engine"], trust_remote_code=job["trust_remote_code"])
    divergence = Divergence(ids[:, 1:].reshape(-1))
    for window in range(windows):
        report.progress("vLLM", window, windows, "windows")
        logits = run(ids[window].tolist())
        tokens = slice(window * (length - 1), (window + 1) * (length - 1))
        for first in range(0, base.head.vocabulary, _ROWS):
            part = slice(first, min(first + _ROWS, base.head.vocabulary))
            own = base.head.logits(states[tokens], base.head.rows(part.start, part.stop))
            divergence.add(tokens, first, own, logits[:, part])
    report.progress("vLLM", windows, windows, "windows")
    return divergence, run.dtype


def _check_pair(base: DecoderStream, quantized: DecoderStream) -> None:
    sizes = {
        "decoder layers": (base.depth, quantized.depth),
        "vocabulary entries": (base.head.vocabulary, quantized.head.vocabulary),
        "hidden channels": (base.hidden_size, quantized.hidden_size),
    }
    for what, (of_base, of_quantized) in sizes.items():
        if of_base != of_quantized:
            raise InputError(
                f"these are different models: {of_base} {what} against {of_quantized}",
                where=f"{base.checkpoint.path} and {quantized.checkpoint.path}",
                hint="give the model that the quantized one was made from",
            )


def check_length(stream: DecoderStream, length: int) -> None:
    """Raises InputError for windows longer than the model's context."""
    config = stream.checkpoint.config
    context = (config.get("text_config") or config).get("max_position_embeddings")
    if isinstance(context, int) and length > context:
        raise InputError(
            f"windows of {length} tokens, but the model's context is {context}",
            where="--length",
            hint=f"use --length {context} or less",
        )


def _text(job: dict[str, Any], checkpoints: list[Checkpoint]) -> Calibration:
    """The windows, and a check that both models' tokenizers make the same of the text."""
    base, quantized = checkpoints
    text = windows_of(job, base)
    same_files = all(_bytes(base.path / name) == _bytes(quantized.path / name) for name in _TOKENIZER_FILES)
    if not same_files and windows_of(job, quantized).digest != text.digest:
        raise InputError(
            "the two models' tokenizers make different tokens of the text",
            where=f"{base.path} and {quantized.path}",
            hint="give the model that the quantized one was made from",
        )
    return text


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def windows_of(job: dict[str, Any], checkpoint: Checkpoint) -> Calibration:
    """The text to evaluate on, by the job's text, windows, length and trust_remote_code."""
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=job["trust_remote_code"])
    windows, length = job["windows"], job["length"]
    try:
        if job["text"] == BUILTIN:
            return held_out(tokenizer, samples=windows, seq_len=length)
        return load(job["text"], tokenizer, samples=windows, seq_len=length, seed=0)
    except InputError as error:
        hint = error.hint and error.hint.replace("--samples", "--windows").replace("--seq-len", "--length")
        raise InputError(error.what, where=error.where, hint=hint) from None
