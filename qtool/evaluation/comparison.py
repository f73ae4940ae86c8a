"""A quantized model against its base: perplexity, KL divergence and agreement of the likeliest tokens, on a text.

Each model runs one decoder layer at a time over all windows, in float32; only hidden states are kept. Their last
ones are compared a slice of the vocabulary at a time. So the peak is one layer, or one slice of both output
projections, beside the hidden states, however deep the models are and however large their vocabulary. On request
the quantized model runs in vLLM instead, whole, as it would serve; its base has been streamed by then.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qtool import memory
from qtool.checkpoint.norms import idle_biases
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.evaluation.divergence import Divergence
from qtool.evaluation.intervals import estimate, estimate_quantile
from qtool.evaluation.job import AlongText, Comparison, ComparisonJob, Figures, Maximum, RuntimeUsed, TextUsed, Vllm
from qtool.evaluation.text import check_length, windows_of_both
from qtool.model.decoder import DecoderStream
from qtool.model.observe import forward

if TYPE_CHECKING:
    from qtool.workers import Report

_TOKENS = 1024  # in a batch
_ROWS = 4096  # of the output projection, at a time
_PARTS = 192  # that the text is cut into at most, to show where the models differ


@torch.no_grad()
def compare(job: ComparisonJob, report: Report) -> Comparison:
    """Compare two checkpoints. Each token of a window but the first is predicted.

    Args:
        report: hears of the progress.

    Raises:
        InputError: a checkpoint that can't be run, two that don't belong together, or too little text.
        QtoolError: a model's hidden states are not finite, or vLLM fails.
    """
    started = time.perf_counter()
    trust = job.trust_remote_code
    base, quantized = (
        DecoderStream(Checkpoint.open(path), dtype=torch.float32, trust_remote_code=trust)
        for path in (job.base, job.quantized)
    )
    _check_pair(base, quantized)
    for stream in (base, quantized):
        idle_biases(stream.checkpoint, "transformers' model")
    check_length(job.text, base.checkpoint)
    text = windows_of_both(job.text, base.checkpoint, quantized.checkpoint, trust_remote_code=trust)
    ran = _Ran(base, _run(base, text.ids, "base", report))
    if job.vllm is not None:
        divergence, dtype = _against_vllm(ran, text.ids, job, job.vllm, report)
    else:
        other = _Ran(quantized, _run(quantized, text.ids, "quantized", report))
        divergence, dtype = _divergence(ran, other, text.ids[:, 1:].reshape(-1), report), "float32"
    windows, length = text.ids.shape
    return Comparison(
        base=str(job.base),
        quantized=str(job.quantized),
        text=TextUsed(text.source, text.digest, windows, length),
        runtime=RuntimeUsed("qtool" if job.vllm is None else "vllm", dtype),
        figures=_figures(divergence, windows),
        seconds=round(time.perf_counter() - started, 2),
        peak_memory_bytes=memory.peak(),
    )


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


# ------------------------------------------------------------------ running the models


@dataclass(frozen=True)
class _Ran:
    """A model, and what its output projection will multiply for every token that has a next one: [tokens, hidden]."""

    stream: DecoderStream
    states: torch.Tensor

    def logits(self, tokens: slice, rows: slice) -> torch.Tensor:
        """Of these tokens, for these entries of the vocabulary: float32 [tokens, rows]."""
        head = self.stream.head
        return head.logits(self.states[tokens], head.rows(rows.start, rows.stop))


def _run(stream: DecoderStream, ids: torch.Tensor, name: str, report: Report) -> torch.Tensor:
    hidden = list(forward(stream, ids, _TOKENS, name, report))[-1]
    for rows in hidden.split(max(1, _TOKENS // ids.shape[1])):
        rows.copy_(stream.head.normalize(rows))
    return hidden[:, :-1].reshape(-1, hidden.shape[2])


def _divergence(base: _Ran, quantized: _Ran, targets: torch.Tensor, report: Report) -> Divergence:
    divergence, vocabulary = Divergence(targets), base.stream.head.vocabulary
    for first in range(0, vocabulary, _ROWS):
        report.progress("compare", first, vocabulary, "tokens of the vocabulary")
        heads = [ran.stream.head.rows(first, min(first + _ROWS, vocabulary)) for ran in (base, quantized)]
        for start in range(0, len(targets), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            own, other = (
                ran.stream.head.logits(ran.states[tokens], rows)
                for ran, rows in zip((base, quantized), heads, strict=True)
            )
            divergence.add(tokens, first, own, other)
    report.progress("compare", vocabulary, vocabulary, "tokens of the vocabulary")
    return divergence


def _against_vllm(
    base: _Ran, ids: torch.Tensor, job: ComparisonJob, vllm: Vllm, report: Report
) -> tuple[Divergence, str]:
    """The quantized model in vLLM, and the dtype that it computes in."""
    from qtool.evaluation.vllm_logits import VllmLogits

    windows, length = ids.shape
    report.progress("start vLLM", 0, 0)
    config = Checkpoint.open(job.quantized).config
    run = VllmLogits(str(job.quantized), config, length, vllm.engine, trust_remote_code=job.trust_remote_code)
    divergence, vocabulary = Divergence(ids[:, 1:].reshape(-1)), base.stream.head.vocabulary
    for window in range(windows):
        report.progress("vLLM", window, windows, "windows")
        logits = run(ids[window].tolist())
        tokens = slice(window * (length - 1), (window + 1) * (length - 1))
        for first in range(0, vocabulary, _ROWS):
            part = slice(first, min(first + _ROWS, vocabulary))
            divergence.add(tokens, first, base.logits(tokens, part), logits[:, part])
    report.progress("vLLM", windows, windows, "windows")
    return divergence, run.dtype


# ------------------------------------------------------------------ what comes of it


def _figures(divergence: Divergence, windows: int) -> Figures:
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
    return Figures(
        base_perplexity=estimate(surprise[0], math.exp),
        quantized_perplexity=estimate(surprise[1], math.exp),
        perplexity_ratio=estimate([b - a for a, b in zip(*surprise, strict=True)], math.exp),
        kl_divergence=estimate(means(kl), lambda value: max(0.0, value)),
        kl_median=estimate_quantile(kl, 0.5),
        kl_p99=estimate_quantile(kl, 0.99),
        kl_max=Maximum(float(kl.max()), window, position),
        top1_agreement=estimate(means(divergence.agreement()), share),
        top5_agreement=estimate(means(divergence.overlap()), share),
        kl_along_text=AlongText(size, [float(part.mean()) for row in kl for part in row.split(size)]),
    )
