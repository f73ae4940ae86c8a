"""Quantized models against their base: perplexity, KL divergence and agreement of the likeliest tokens, on a text.

Each model runs one decoder layer at a time over all windows, in float32; only hidden states are kept. The last ones of
all models are compared a slice of the vocabulary at a time, so that the base's logits are computed once. So the peak
is one layer, or one slice of the output projections, beside one set of hidden states for each model, however deep the
models are and however large their vocabulary. On request the quantized models run in vLLM instead, whole, as they
would serve, one after the other; their base has been streamed by then.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qtool import memory
from qtool.checkpoint.norms import idle_biases
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.evaluation.divergence import Divergence, add_all
from qtool.evaluation.intervals import estimate, estimate_quantile
from qtool.evaluation.job import AlongText, Comparison, ComparisonJob, Figures, Maximum, RuntimeUsed, TextUsed, Vllm
from qtool.evaluation.text import check_length, windows_of_all
from qtool.model.decoder import DecoderStream
from qtool.model.observe import forward

if TYPE_CHECKING:
    from qtool.workers import Report

_TOKENS = 1024  # in a batch
_ROWS = 4096  # of the output projection, at a time
_PARTS = 192  # that the text is cut into at most, to show where the models differ


@torch.no_grad()
def compare(job: ComparisonJob, report: Report) -> list[Comparison]:
    """Compare checkpoints with one base. Each token of a window but the first is predicted.

    Args:
        report: hears of the progress.

    Returns:
        One comparison per quantized model, in their order.

    Raises:
        InputError: a checkpoint that can't be run, some that don't belong together, or too little text.
        QtoolError: a model's hidden states are not finite, or vLLM fails.
    """
    started, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    trust = job.trust_remote_code
    base, *others = (
        DecoderStream(Checkpoint.open(path), dtype=torch.float32, trust_remote_code=trust)
        for path in (job.base, *job.quantized)
    )
    for other in others:
        _check_pair(base, other)
    for stream in (base, *others):
        idle_biases(stream.checkpoint, "transformers' model")
    check_length(job.text, base.checkpoint)
    text = windows_of_all(job.text, base.checkpoint, [other.checkpoint for other in others], trust_remote_code=trust)
    ran = _Ran(base, _run(base, text.ids, "base", report))
    if job.vllm:
        found = [
            _against_vllm(ran, text.ids, path, vllm, report, trust_remote_code=trust)
            for path, vllm in zip(job.quantized, job.vllm, strict=True)
        ]
    else:
        names = [
            f"quantized {i} of {len(others)}" if len(others) > 1 else "quantized" for i in range(1, len(others) + 1)
        ]
        states = [_Ran(other, _run(other, text.ids, name, report)) for other, name in zip(others, names, strict=True)]
        targets = text.ids[:, 1:].reshape(-1)
        found = [(divergence, "float32") for divergence in _divergences(ran, states, targets, report)]
    windows, length = text.ids.shape
    return [
        Comparison(
            base=str(job.base),
            quantized=str(path),
            text=TextUsed(text.source, text.digest, windows, length),
            runtime=RuntimeUsed("vllm" if job.vllm else "qtool", dtype),
            date=date,
            versions=_versions(),
            figures=_figures(divergence, windows),
            seconds=round(time.perf_counter() - started, 2),
            peak_memory_bytes=memory.peak(),
        )
        for path, (divergence, dtype) in zip(job.quantized, found, strict=True)
    ]


def _versions() -> dict[str, str]:
    """Of what computes here."""
    packages = [name for name in ("torch", "transformers", "vllm") if name in sys.modules]
    return {"python": platform.python_version()} | {name: str(sys.modules[name].__version__) for name in packages}


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
    *_, last = forward(stream, ids, _TOKENS, name, report)
    states = []
    for batch in last.split(max(1, _TOKENS // ids.shape[1])):
        leaving = stream.head.leaving(batch)[:, :-1]
        states.append(leaving.reshape(-1, leaving.shape[2]))
    return torch.cat(states)


def _divergences(base: _Ran, others: Sequence[_Ran], targets: torch.Tensor, report: Report) -> list[Divergence]:
    first_one = Divergence(targets)
    divergences = [first_one, *(Divergence(targets, beside=first_one) for _ in others[1:])]
    vocabulary = base.stream.head.vocabulary
    for first in range(0, vocabulary, _ROWS):
        report.progress("compare", first, vocabulary, "tokens of the vocabulary")
        heads = [ran.stream.head.rows(first, min(first + _ROWS, vocabulary)) for ran in (base, *others)]
        for start in range(0, len(targets), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            own, *rest = (
                functools.partial(ran.stream.head.logits, ran.states[tokens], rows)
                for ran, rows in zip((base, *others), heads, strict=True)
            )
            add_all(divergences, tokens, first, own(), (logits() for logits in rest))
    report.progress("compare", vocabulary, vocabulary, "tokens of the vocabulary")
    return divergences


def _against_vllm(
    base: _Ran, ids: torch.Tensor, quantized: Path, vllm: Vllm, report: Report, *, trust_remote_code: bool
) -> tuple[Divergence, str]:
    """A quantized model in vLLM, and the dtype that it computes in."""
    from qtool.evaluation.vllm_logits import VllmLogits

    windows, length = ids.shape
    report.progress("start vLLM", 0, 0)
    config = Checkpoint.open(quantized).config
    divergence, vocabulary = Divergence(ids[:, 1:].reshape(-1)), base.stream.head.vocabulary
    with contextlib.closing(
        VllmLogits(str(quantized), config, length, vllm.engine, trust_remote_code=trust_remote_code)
    ) as run:
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
        kl_by_window=means(kl),
        kl_along_text=AlongText(size, [float(part.mean()) for row in kl for part in row.split(size)]),
    )
