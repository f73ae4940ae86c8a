"""A routed expert as the quantizer sees it: smoothed on the tokens that it gets, then rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import nn

from qtool.checkpoint.formats import QuantizedFormat
from qtool.engines.native.context import storage
from qtool.engines.native.device import Room
from qtool.model.observe import sample_stride
from qtool.model.weights import ModelWeights, StoredWeights, refuse_damage
from qtool.quant.group import GroupUnderWay, apart, needs_hessian, quantize_group
from qtool.quant.layer import smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, find_groups
from qtool.recipe.schema import Policy

PARTS = GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_FEW = 8
Gate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExpertLinears:
    """The linears of one expert, by gate_proj, up_proj, down_proj.

    Attributes:
        names: the checkpoint's names without ".weight".
        policies: None leaves a linear float.
        groups: from `expert_groups`.
    """

    names: dict[str, str]
    policies: dict[str, Policy | None]
    groups: Sequence[Group]

    def stored(self, weights: ModelWeights) -> dict[str, str]:
        """The checkpoint's names of weights and biases."""
        names = {f"{part}.{kind}": f"{name}.{kind}" for part, name in self.names.items() for kind in ("weight", "bias")}
        return {name: stored for name, stored in names.items() if stored in weights}


@dataclass(frozen=True)
class ExpertSamples:
    """Calibration tokens of one expert.

    Attributes:
        seen: what enters gate_proj and up_proj, [n, hidden]; n may be 0.
        inner: what enters down_proj, [n, intermediate]; None for no tokens.
    """

    seen: torch.Tensor
    inner: torch.Tensor | None


class SmoothedExpert:
    """A routed expert with its smoothing scales folded in, ready to be quantized.

    Raises InputError when its tokens' activations can't be true.

    Attributes:
        folded: its float weights, by gate_proj, up_proj, down_proj.
    """

    def __init__(
        self,
        linears: ExpertLinears,
        samples: ExpertSamples,
        weights: ModelWeights,
        output_format: QuantizedFormat,
        rows: Room,
    ) -> None:
        self._rows = rows
        policies = linears.policies
        first = [part for part in linears.names if part != DOWN]
        statistics = {
            first[0]: _statistics([policies[part] for part in first], samples.seen),
            DOWN: _statistics((policies[DOWN],), samples.inner),
        }
        own = StoredWeights(weights, linears.stored(weights))
        self._storage = storage(output_format, weights.dtype(f"{linears.names[DOWN]}.weight"))
        self._policies, self._device = policies, samples.seen.device
        width = own.shape(DOWN)[1]
        self._groups = [
            group
            if group.fold is None
            else dataclasses.replace(group, fold=dataclasses.replace(group.fold, channel_map=torch.arange(width)))
            for group in linears.groups
        ]
        self._observed = {name: value for name, value in statistics.items() if value is not None}
        for part, observed in self._observed.items():
            refuse_damage(observed.amax, linears.names[part], weights)
        if len(self._observed) < len(statistics):
            self._groups = [Group(group.linears) for group in linears.groups]  # nothing to find a smoothing scale from
        self.folded, self._found = smooth(own, self._groups, policies, self._observed, self._storage.dtype)

    def quantize(self) -> Iterator[tuple[GroupUnderWay, bool]]:
        """(the linears, whether tokens were seen) of each group that its policy quantizes."""
        for group in self._groups:
            name = group.linears[0]
            for alike in apart(group, self._policies):
                seen = self._observed.get(name) or InputStatistics.empty(self.folded.shape(name)[1]).to(self._device)
                made = self._rows.fit(
                    partial(quantize_group, self.folded, group, alike, seen, self._found.get(name), self._storage)
                )
                yield made, name in self._observed


def _statistics(policies: Sequence[Policy | None], x: torch.Tensor | None) -> InputStatistics | None:
    """Of the tokens x [n, in]; None when there are none."""
    if x is None or not len(x):
        return None
    with_hessian = any(policy is not None and needs_hessian(policy) for policy in policies)
    observed = InputStatistics(stride=sample_stride(len(x)), with_hessian=with_hessian, hessian_stride=1)
    observed.update(x)
    return observed


class _Small(nn.Module):
    """An expert of a few channels, to probe what its scales can be folded into."""

    def __init__(self, apply_gate: Gate, *, has_gate: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(_FEW, _FEW, bias=False) if has_gate else None
        self.up_proj, self.down_proj = (nn.Linear(_FEW, _FEW, bias=False) for _ in range(2))
        self._apply_gate = apply_gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = (self.up_proj(x),) if self.gate_proj is None else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self._apply_gate(torch.cat(first, dim=-1)))


@lru_cache(maxsize=1)
def expert_groups(apply_gate: Gate, *, has_gate: bool = True) -> list[Group]:
    """The groups of an expert: gate and up, and down, whose scale folds into up unless the gate clamps it.

    The channel map is left at a few channels: channel i of down is channel i of up.
    """
    generator = torch.Generator().manual_seed(0)
    small = _Small(apply_gate, has_gate=has_gate)
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, 4, _FEW, generator=generator)
    return find_groups(small, lambda: small(x))
