"""A decoder layer as Golden Stick quantizes it: all at once, while it is loaded, judged by the whole layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from qtool.engines.native.pieces import Float, Linear, Piece, Row
from qtool.engines.native.units import LayerLinears
from qtool.quant import exact
from qtool.quant.group import Storage
from qtool.quant.statistics import InputStatistics


def quantize_exactly(
    layer: nn.Module,
    linears: LayerLinears,
    statistics: Mapping[str, InputStatistics],
    storage: Storage,
    runs: Sequence[Callable[[], torch.Tensor]],
) -> Iterator[Piece]:
    """Linears, then the layer's other parameters as smoothing left them, then reports.

    Args:
        layer: with its weights; it is changed.
        statistics: of each group's input on every token, by the group's first linear.
        storage: what the output keeps.
        runs: one per sample; calls the layer on it.
    """
    layer.float()
    result = exact.quantize_layer(layer, linears.groups, linears.policies, statistics, storage, runs)
    for name, linear in result.linears.items():
        yield Linear(linears.name(name), linear)
    quantized = {f"{name}.{part}" for name in result.linears for part in ("weight", "bias")}
    for name, parameter in layer.named_parameters():
        if name not in quantized:
            yield Float(linears.stored[name], parameter.detach())
    for report in result.groups:
        yield Row(report)
