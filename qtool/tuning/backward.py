"""Gradients of log p, of tokens drawn from the model, by what leaves each layer; one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from qtool.model.decoder import DecoderStream
from qtool.model.state import Batch
from qtool.tuning.experts import gradients, replaced

if TYPE_CHECKING:
    from qtool.workers import Report

_DRAWS = 2  # tokens drawn per position; each costs a backward pass and steadies the estimate
_ROWS = 4096  # of the output projection, at a time
_HEAD_TOKENS = 1024  # through the output projection, at a time


def backward(
    stream: DecoderStream, ids: torch.Tensor, hidden: Sequence[torch.Tensor], batch: int, report: Report
) -> list[torch.Tensor]:
    """Gradients by what leaves each layer: [draws, windows, length, hidden] each.

    Args:
        ids: the tokens, int64 [windows, length].
        hidden: what enters each layer, and what leaves the last: [windows, length, hidden] each.
        batch: windows at a time.
        report: hears of the progress.
    """
    gradient = _head_gradient(stream, hidden[-1], report)
    entering = [gradient]
    for index in reversed(range(1, stream.depth)):
        report.progress("backward", stream.depth - 1 - index, stream.depth - 1, "layers")
        with stream.layer(index) as layer:
            pieces = []
            routed = stream.routed(index)
            parts = zip(ids.split(batch), hidden[index].split(batch), gradient.split(batch, dim=1), strict=True)
            for tokens, x, g in parts:
                with torch.enable_grad(), replaced(routed) as passages:
                    x = x.detach().requires_grad_()
                    output = stream.run(index, layer, Batch(tokens, (x,))).hidden
                found = gradients(routed, passages, output, [x], g)
                pieces.append(torch.stack([by_draw[0] for by_draw in found.by]))
            gradient = torch.cat(pieces, dim=1)
        entering.append(gradient)
    report.progress("backward", stream.depth - 1, stream.depth - 1, "layers")
    return entering[::-1]


def _head_gradient(stream: DecoderStream, hidden: torch.Tensor, report: Report) -> torch.Tensor:
    """Gradient of log p(y) by what leaves the last layer, y drawn from p, a slice of the vocabulary at a time.

    By the logits it is onehot(y) - p; y is drawn as the largest logit plus Gumbel noise, which needs no p.
    """
    flat = hidden.reshape(-1, hidden.shape[2])
    result = torch.zeros(_DRAWS, *flat.shape)
    for start in range(0, len(flat), _HEAD_TOKENS):
        report.progress("head", start, len(flat), "tokens")
        tokens = slice(start, start + _HEAD_TOKENS)
        with torch.enable_grad():
            x = flat[tokens].detach().requires_grad_()
            normalized = stream.head.normalize(x)
        drawn, normalizer = _draw(stream, normalized.detach())
        total = torch.zeros(_DRAWS, *normalized.shape)
        for first, stop in _slices(stream.head.vocabulary):
            rows = stream.head.rows(first, stop)
            with torch.enable_grad():
                leaf = normalized.detach().requires_grad_()
                logits = stream.head.logits(leaf, rows)
            p = (logits.detach() - normalizer[:, None]).exp()
            for draw in range(_DRAWS):
                wanted = -p
                inside = (drawn[draw] >= first) & (drawn[draw] < stop)
                wanted[inside.nonzero()[:, 0], drawn[draw][inside] - first] += 1
                total[draw] += _gradient(logits, leaf, wanted, draw)
        for draw in range(_DRAWS):
            result[draw, tokens] = _gradient(normalized, x, total[draw], draw)
    report.progress("head", len(flat), len(flat), "tokens")
    return result.view(_DRAWS, *hidden.shape)


def _gradient(output: torch.Tensor, by: torch.Tensor, seed: torch.Tensor, draw: int) -> torch.Tensor:
    """The gradient by one tensor, for one of the draws."""
    return torch.autograd.grad(output, by, seed, retain_graph=draw + 1 < _DRAWS)[0]


def _draw(stream: DecoderStream, normalized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens drawn from the model's distribution, int64 [draws, tokens]; their normalizer, float32 [tokens])."""
    count = len(normalized)
    best = torch.full((_DRAWS, count), -torch.inf)
    drawn = torch.zeros((_DRAWS, count), dtype=torch.int64)
    sums = []
    for first, stop in _slices(stream.head.vocabulary):
        logits = stream.head.logits(normalized, stream.head.rows(first, stop))
        sums.append(logits.logsumexp(dim=1))
        for draw in range(_DRAWS):
            gumbel = -torch.empty_like(logits).exponential_().log_()
            largest, place = (logits + gumbel).max(dim=1)
            drawn[draw] = torch.where(largest > best[draw], place + first, drawn[draw])
            best[draw] = torch.maximum(best[draw], largest)
    return drawn, torch.stack(sums).logsumexp(dim=0)


def _slices(vocabulary: int) -> Iterator[tuple[int, int]]:
    for first in range(0, vocabulary, _ROWS):
        yield first, min(first + _ROWS, vocabulary)
