"""Running the float model and looking on: what enters the linears of a layer, and what leaves the layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.model.caches import Keeping, kept
from qtool.model.decoder import DecoderStream
from qtool.model.experts import Handler, handled
from qtool.model.state import Batch
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
    batches: Iterable[Batch],
    statistics: Mapping[str, InputStatistics] | None = None,
    experts: Handler | None = None,
    caches: Mapping[str, Keeping] | None = None,
) -> Iterator[Batch]:
    """Run one decoder layer on batch after batch.

    Args:
        index: the layer's number.
        layer: with its weights.
        batches: what enters the layer.
        statistics: count what enters the linears of these names inside the layer.
        experts: what a call of the layer's routed experts does; None has them called.
        caches: what becomes of the keys and values of the attention modules of these names inside the layer.

    Yields:
        What leaves the layer for each batch.
    """
    routed = stream.routed(index)
    with ExitStack() as stack:
        stack.enter_context(_counting(layer, statistics or {}))
        stack.enter_context(kept(layer, caches or {}))
        if routed is not None and experts is not None:
            stack.enter_context(handled(routed, experts))
        for batch in batches:
            yield stream.run(index, layer, batch.to(stream.device))


def forward(stream: DecoderStream, ids: torch.Tensor, batch_tokens: int, step: str, report: Report) -> Iterator[Batch]:
    """Run all decoder layers over token ids [samples, length], about `batch_tokens` of them at a time.

    Args:
        step: what the progress is called.

    Yields:
        What enters the first layer, and then what leaves each; in the same tensors wherever they fit.

    Raises:
        QtoolError: hidden states are not finite.
    """
    batch = stream.prologue(ids)
    yield batch
    for index in range(stream.depth):
        report.progress(step, index, stream.depth, "layers")
        parts = [*batch.split(max(1, batch_tokens // ids.shape[1]))]
        with stream.layer(index) as layer:
            batch = _gathered(batch, parts, observe(stream, index, layer, parts))
        if not all(map(_is_finite, batch.state)):
            raise QtoolError(
                f"the hidden states after {stream.layer_name(index)} are not finite",
                where=str(stream.checkpoint.path),
                hint="the checkpoint is damaged, or its scales are wrong",
            )
        yield batch
    report.progress(step, stream.depth, stream.depth, "layers")


def _gathered(whole: Batch, parts: list[Batch], outputs: Iterator[Batch]) -> Batch:
    """All outputs, in the tensors of `whole`, whose parts gave them, where they have the same form."""
    into: Batch | None = None
    start = 0
    for part, output in zip(parts, outputs, strict=True):
        if into is None:
            fits = [(t.shape[1:], t.dtype) for t in output.state] == [(t.shape[1:], t.dtype) for t in whole.state]
            empty = (t.new_empty(len(whole.ids), *t.shape[1:], device="cpu") for t in output.state)
            into = whole if fits else Batch(whole.ids, tuple(empty))
        for target, tensor in zip(into.state, output.state, strict=True):
            target[start : start + len(part.ids)].copy_(tensor)
        start += len(part.ids)
    assert into is not None
    return into


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


@contextmanager
def _counting(layer: nn.Module, statistics: Mapping[str, InputStatistics]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, seen in statistics.items():
            hook = layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
            stack.callback(hook.remove)
        yield
