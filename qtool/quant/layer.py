"""One decoder layer from float to integers: smoothing, folding, clipping, rounding, activation ranges.

Weights come a few rows at a time from a `Weights`, and the layer's groups one after the other, so that a layer of any
size is quantized in the memory of one group's statistics and a few rows. (`exact` is Golden Stick's way instead.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qtool.quant.group import Storage, apart, policy_of, quantize_group
from qtool.quant.report import GroupReport
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group
from qtool.quant.transforms import Diagonal, Folded, transform_of
from qtool.quant.types import QuantizedLinear
from qtool.quant.weights import ModuleWeights, Weights
from qtool.recipe.policy import Policy


@dataclass
class LayerResult:
    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)


@torch.no_grad()
def smooth(
    weights: Weights,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
    dtype: torch.dtype,
    known: Mapping[str, Diagonal] | None = None,
) -> tuple[Folded, dict[str, Diagonal]]:
    """Find every group's smoothing scale on the untouched layer, then fold them all.

    Args:
        weights: of the layer.
        groups: from `topology.find_groups`.
        policies: per linear, by its name inside the layer; None leaves it float.
        statistics: of each group's input, by the name of the group's first linear.
        dtype: of the model's float tensors.
        known: scales that have been found already, by the name of their group's first linear.

    Returns:
        The folded weights, and the scales found by the name of their group's first linear.
    """
    folded, found = Folded(weights), {**(known or {})}
    for group in groups:
        if group.linears[0] in found:
            continue
        policy, first = policy_of(group, policies), group.linears[0]
        transform = transform_of(policy) if policy is not None and group.fold is not None else None
        diagonal = transform.fit(weights, group, statistics[first]) if transform is not None else None
        if diagonal is not None:
            found[first] = diagonal
    for group in groups:
        if group.linears[0] in found:
            folded.fold(group, found[group.linears[0]].s, dtype)
    return folded, found


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
    storage: Storage,
) -> LayerResult:
    """Quantize a decoder layer in memory, and leave it with the folded float weights.

    Args:
        layer: float32 weights.
        groups, policies, statistics: as for `smooth`.
        storage: what the output format keeps.
    """
    folded, found = smooth(ModuleWeights(layer), groups, policies, statistics, storage.dtype)
    result = LayerResult()
    for group in groups:
        first = group.linears[0]
        for alike in apart(group, policies):
            made = quantize_group(folded, group, alike, statistics[first], found.get(first), storage)
            linears, row = made.result()
            result.linears |= linears
            result.groups.append(row)
    changed = {f"{name}.weight": folded.rows(name, 0, folded.shape(name)[0]) for name in folded.linears}
    for name, tensor in (changed | folded.changed).items():
        layer.get_parameter(name).copy_(tensor)
    return result
