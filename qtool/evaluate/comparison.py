"""A quantized model against its base: perplexity, KL divergence and top-1 agreement on a text.

Each model runs one decoder layer at a time over all windows, in float32; only hidden states are kept. Their last
ones are compared a slice of the vocabulary at a time. So the peak is one layer, or one slice of both output
projections, beside the hidden states, however deep the models are and however large their vocabulary.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qtool.calibration.text import BUILTIN, Calibration, held_out, load, load_tokenizer
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.native import memory
from qtool.engines.native.stream import DecoderStream
from qtool.errors import InputError, QtoolError
from qtool.evaluate.divergence import Divergence
from qtool.evaluate.intervals import estimate

if TYPE_CHECKING:
    from qtool.workers import Report

_TOKENS = 1024  # in a batch
_ROWS = 4096  # of the output projection, at a time
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


@torch.no_grad()
def compare(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Compare two checkpoints.

    Job keys: base, quantized (folders), text (builtin or a file), windows, length (tokens), trust_remote_code.
    Window i is the text's tokens i·length to (i+1)·length - 1; each of its tokens but the first is predicted.

    Returns:
        base_perplexity, quantized_perplexity, perplexity_ratio, kl_divergence (of the quantized from the base, nats
        per token) and top1_agreement, each {"value", "low", "high"} with a 95 % confidence interval over windows;
        and base, quantized, text, seconds, peak_memory_bytes.

    Raises:
        InputError: a checkpoint that can't be run, two that don't belong together, or too little text.
        QtoolError: a model's hidden states are not finite.
    """
    started = time.perf_counter()
    trust: bool = job["trust_remote_code"]
    checkpoints = [Checkpoint.open(job["base"]), Checkpoint.open(job["quantized"])]
    base, quantized = streams = [DecoderStream(c, dtype=torch.float32, trust_remote_code=trust) for c in checkpoints]
    _check_pair(base, quantized)
    _check_length(base, job["length"])
    text = _text(job, checkpoints)
    states = [_run(stream, text.ids, name, report) for stream, name in zip(streams, ("base", "quantized"), strict=True)]
    divergence = _divergence(streams, states, text.ids[:, 1:].reshape(-1), report)

    def per_window(tokens: torch.Tensor) -> list[float]:
        return tokens.double().view(text.ids.shape[0], -1).mean(dim=1).tolist()

    surprise = [per_window(side.surprise()) for side in (divergence.base, divergence.other)]
    return {
        "base": job["base"],
        "quantized": job["quantized"],
        "text": {
            "source": text.source,
            "sha256": text.digest,
            "windows": text.ids.shape[0],
            "length": text.ids.shape[1],
        },
        "base_perplexity": estimate(surprise[0], math.exp),
        "quantized_perplexity": estimate(surprise[1], math.exp),
        "perplexity_ratio": estimate([b - a for a, b in zip(*surprise, strict=True)], math.exp),
        "kl_divergence": estimate(per_window(divergence.kl())),
        "top1_agreement": estimate(per_window(divergence.agreement()), lambda share: min(1.0, max(0.0, share))),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": memory.peak(),
    }


def _run(stream: DecoderStream, ids: torch.Tensor, name: str, report: Report) -> torch.Tensor:
    """What the output projection will multiply for every token that has a next one: [tokens, hidden]."""
    hidden = stream.prologue(ids)
    batch = max(1, _TOKENS // ids.shape[1])
    for index in range(stream.depth):
        report.progress(name, index, stream.depth, "layers")
        with stream.layer(index) as layer:
            for rows in hidden.split(batch):
                rows.copy_(stream.run(index, layer, rows))
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(hidden)):
            raise QtoolError(
                f"the hidden states after {stream.layer_name(index)} are not finite",
                where=str(stream.checkpoint.path),
                hint="the checkpoint is damaged, or its scales are wrong",
            )
    report.progress(name, stream.depth, stream.depth, "layers")
    for rows in hidden.split(batch):
        rows.copy_(stream.normalize(rows))
    return hidden[:, :-1].reshape(-1, hidden.shape[2])


def _divergence(
    streams: list[DecoderStream], states: list[torch.Tensor], targets: torch.Tensor, report: Report
) -> Divergence:
    divergence = Divergence(targets)
    rows = streams[0].vocabulary
    for first in range(0, rows, _ROWS):
        report.progress("compare", first, rows, "tokens of the vocabulary")
        heads = [stream.head(first, min(first + _ROWS, rows)) for stream in streams]
        for start in range(0, len(targets), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            base, quantized = (
                stream.logits(state[tokens], head) for stream, state, head in zip(streams, states, heads, strict=True)
            )
            divergence.add(tokens, first, base, quantized)
    report.progress("compare", rows, rows, "tokens of the vocabulary")
    return divergence


def _check_pair(base: DecoderStream, quantized: DecoderStream) -> None:
    sizes = {
        "decoder layers": (base.depth, quantized.depth),
        "vocabulary entries": (base.vocabulary, quantized.vocabulary),
        "hidden channels": (base.hidden_size, quantized.hidden_size),
    }
    for what, (of_base, of_quantized) in sizes.items():
        if of_base != of_quantized:
            raise InputError(
                f"these are different models: {of_base} {what} against {of_quantized}",
                where=f"{base.checkpoint.path} and {quantized.checkpoint.path}",
                hint="give the model that the quantized one was made from",
            )


def _check_length(stream: DecoderStream, length: int) -> None:
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
    text = _tokenized(job, base)
    same_files = all(_bytes(base.path / name) == _bytes(quantized.path / name) for name in _TOKENIZER_FILES)
    if not same_files and _tokenized(job, quantized).digest != text.digest:
        raise InputError(
            "the two models' tokenizers make different tokens of the text",
            where=f"{base.path} and {quantized.path}",
            hint="give the model that the quantized one was made from",
        )
    return text


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _tokenized(job: dict[str, Any], checkpoint: Checkpoint) -> Calibration:
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=job["trust_remote_code"])
    windows, length = job["windows"], job["length"]
    try:
        if job["text"] == BUILTIN:
            return held_out(tokenizer, samples=windows, seq_len=length)
        return load(job["text"], tokenizer, samples=windows, seq_len=length, seed=0)
    except InputError as error:
        hint = error.hint and error.hint.replace("--samples", "--windows").replace("--seq-len", "--length")
        raise InputError(error.what, where=error.where, hint=hint) from None
