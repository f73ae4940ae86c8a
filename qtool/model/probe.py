"""Which linears of a decoder layer share their input, and what scales could be folded into: found by running it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import nn

from qtool.model.decoder import DecoderStream
from qtool.model.experts import RoutedExperts, handled
from qtool.model.state import Batch
from qtool.quant.topology import Group, find_groups

_TOKENS = 8


@dataclass(frozen=True)
class Probed:
    """What running a layer on a few tokens shows.

    Attributes:
        groups: of its linears, without routed experts.
        experts_are_added: what routed experts give is added to the hidden states that leave the layer, and nothing
            else takes it up; True for a layer without.
    """

    groups: list[Group]
    experts_are_added: bool


def probe(stream: DecoderStream, index: int, layer: nn.Module) -> Probed:
    """Probe a loaded layer, with a few tokens of random hidden states in float32."""
    few, routed, added = _random(stream, index), stream.routed(index), True

    def run() -> torch.Tensor:
        state = stream.run(index, layer, few).state
        if len(state) == 1:
            return state[0]
        return torch.cat([tensor.flatten() for tensor in state if tensor.is_floating_point()])

    with stream.precision(torch.float32):
        layer.float()
        if routed is None:
            groups = find_groups(layer, run, stream.heads)
        else:
            # Stands for experts: their output depends on their input and on the routing, so nothing before them
            # may change.
            with handled(routed, lambda x, _chosen, weights: x * (1 + weights.sum(dim=-1, keepdim=True))):
                groups = find_groups(layer, run, stream.heads)
            added = _are_added(stream, index, layer, few, routed)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not stream.is_kept_in_float32(name):
            tensor.data = tensor.data.to(stream.dtype)
    own = stream.own_parameters(index).keys()
    return Probed(_usable(groups, own, own - stream.shared_parameters(index)), added)


def _usable(groups: list[Group], own: Container[str], alone: Container[str]) -> list[Group]:
    """The groups of the layer's own linears.

    Args:
        own: parameters of the layer that no layer before has.
        alone: those that none behind has either; others are scaled nowhere.
    """
    found = []
    for group in groups:
        linears = tuple(name for name in group.linears if f"{name}.weight" in own)
        scaled = [*group.linears, *([group.fold.producer] if group.fold else [])]
        if linears:
            found.append(Group(linears, group.fold if all(f"{name}.weight" in alone for name in scaled) else None))
    return found


def _random(stream: DecoderStream, index: int) -> Batch:
    """What could enter a layer: random hidden states, and whole numbers that are 0."""
    generator = torch.Generator().manual_seed(0)
    state = [
        torch.randn(1, *shape, generator=generator) if dtype.is_floating_point else torch.zeros(1, *shape, dtype=dtype)
        for shape, dtype in stream.entering(index, _TOKENS)
    ]
    ids = torch.arange(_TOKENS)[None]
    return Batch(ids, tuple(state)).to(stream.device)


def _are_added(stream: DecoderStream, index: int, layer: nn.Module, few: Batch, routed: RoutedExperts) -> bool:
    with handled(routed, lambda x, _chosen, _weights: torch.zeros_like(x)):
        without = stream.run(index, layer, few).state
    with handled(routed, lambda x, _chosen, _weights: torch.ones_like(x)):
        added = stream.run(index, layer, few).state
    changes = [a.float() - b.float() for a, b in zip(added, without, strict=True)]
    wanted = [torch.ones_like(changes[0]), *map(torch.zeros_like, changes[1:])]
    return changes[0].dim() == 3 and all(
        torch.allclose(change, want, rtol=1e-3, atol=1e-3) for change, want in zip(changes, wanted, strict=True)
    )
