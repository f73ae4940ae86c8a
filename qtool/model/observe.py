"""Running the float model and looking on: what enters the linears of a layer, and what leaves the layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.model.decoder import DecoderStream
from qtool.model.experts import Handler, handled
from qtool.quant.statistics import InputStatistics

if TYPE_CHECKING:
    from qtool.workers import Report

_SAMPLE_TOKENS = 512  # that a sample of an input holds


def sample_stride(tokens: int) -> int:
    """Every how many tokens `InputStatistics` is to keep one, of so many."""
    return max(1, tokens // _SAMPLE_TOKENS)


def observe(
    stream: DecoderStream,
    index: int,
    layer: nn.Module,
    batches: Iterable[torch.Tensor],
    statistics: Mapping[str, InputStatistics] | None = None,
    experts: Handler | None = None,
) -> Iterator[torch.Tensor]:
    """Run one decoder layer on batch after batch of hidden states.

    Args:
        index: the layer's number.
        layer: with its weights.
        batches: [n, length, hidden] each, of a length that `stream.prologue` has seen.
        statistics: count what enters the linears of these names inside the layer.
        experts: what a call of the layer's routed experts does; None has them called.

    Yields:
        What leaves the layer for each batch, [n, length, hidden].
    """
    routed = stream.routed(index)
    with ExitStack() as stack:
        stack.enter_context(_counting(layer, statistics or {}))
        if routed is not None and experts is not None:
            stack.enter_context(handled(routed, experts))
        for batch in batches:
            yield stream.run(index, layer, batch.to(stream.device))


def forward(
    stream: DecoderStream, ids: torch.Tensor, batch_tokens: int, step: str, report: Report
) -> Iterator[torch.Tensor]:
    """Run all decoder layers over token ids [samples, length], about `batch_tokens` of them at a time.

    Args:
        step: what the progress is called.

    Yields:
        What enters the first layer, and then what leaves each: [samples, length, hidden], always the same tensor.

    Raises:
        QtoolError: hidden states are not finite.
    """
    hidden = stream.prologue(ids)
    yield hidden
    for index in range(stream.depth):
        report.progress(step, index, stream.depth, "layers")
        parts = hidden.split(max(1, batch_tokens // ids.shape[1]))
        with stream.layer(index) as layer:
            for part, output in zip(parts, observe(stream, index, layer, parts), strict=True):
                part.copy_(output)
        if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(hidden)):
            raise QtoolError(
                f"the hidden states after {stream.layer_name(index)} are not finite",
                where=str(stream.checkpoint.path),
                hint="the checkpoint is damaged, or its scales are wrong",
            )
        yield hidden
    report.progress(step, stream.depth, stream.depth, "layers")


@contextmanager
def _counting(layer: nn.Module, statistics: Mapping[str, InputStatistics]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, seen in statistics.items():
            hook = layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
            stack.callback(hook.remove)
        yield
