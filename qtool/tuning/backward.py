"""Gradients of log p, of tokens drawn from the model, by what leaves each layer; one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qtool.model.decoder import DecoderStream
from qtool.model.gradients import gradients, head_gradient, replaced
from qtool.model.state import Batch

if TYPE_CHECKING:
    from qtool.workers import Report

_DRAWS = 2  # tokens drawn per position


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
    tokens = hidden[-1].shape[0] * hidden[-1].shape[1]
    gradient = head_gradient(stream, hidden[-1], _DRAWS, lambda done: report.progress("head", done, tokens, "tokens"))
    entering = [gradient]
    for index in reversed(range(1, stream.depth)):
        report.progress("backward", stream.depth - 1 - index, stream.depth - 1, "layers")
        with stream.layer(index) as layer:
            pieces = []
            routed = stream.routed(index)
            parts = zip(ids.split(batch), hidden[index].split(batch), gradient.split(batch, dim=1), strict=True)
            for own, x, g in parts:
                with torch.enable_grad(), replaced(routed) as passages:
                    x = x.detach().requires_grad_()
                    output = stream.run(index, layer, Batch(own, (x,))).hidden
                found = gradients(routed, passages, output, [x], g)
                pieces.append(torch.stack([by_draw[0] for by_draw in found.by]))
            gradient = torch.cat(pieces, dim=1)
        entering.append(gradient)
    report.progress("backward", stream.depth - 1, stream.depth - 1, "layers")
    return entering[::-1]
