"""Which linears of a decoder layer share their input, and what scales could be folded into: found by running it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.model.experts import RoutedExperts, handled
from qtool.quant.topology import Group, find_groups

_TOKENS = 8


def probe(stream: DecoderStream, index: int, layer: nn.Module) -> list[Group]:
    """The groups of a loaded layer, from a few tokens of random hidden states in float32; without its routed experts.

    Raises InputError when what the routed experts give is not simply added to the layer's output.
    """
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, _TOKENS, stream.hidden_size, generator=generator).to(stream.device)
    routed = stream.routed(index)
    with stream.precision(torch.float32, _TOKENS):
        layer.float()
        if routed is None:
            groups = find_groups(layer, lambda: stream.run(index, layer, few), stream.heads)
        else:
            # Stands for experts: their output depends on their input and on the routing, so nothing before them
            # may change.
            with handled(routed, lambda x, _chosen, weights: x * (1 + weights.sum(dim=-1, keepdim=True))):
                groups = find_groups(layer, lambda: stream.run(index, layer, few), stream.heads)
            _check_added(routed, lambda: stream.run(index, layer, few), str(stream.checkpoint.path))
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not stream.is_kept_in_float32(name):
            tensor.data = tensor.data.to(stream.dtype)
    return groups


def _check_added(module: RoutedExperts, run: Callable[[], torch.Tensor], where: str) -> None:
    with handled(module, lambda x, _chosen, _weights: torch.zeros_like(x)):
        without = run()
    with handled(module, lambda x, _chosen, _weights: torch.ones_like(x)):
        added = run() - without
    if not torch.allclose(added, torch.ones_like(added), rtol=1e-3, atol=1e-3):
        raise InputError(
            "the output of this architecture's experts goes through something else in the same layer",
            where=where,
            hint="qtool quantizes mixtures of experts whose output is added to the residual stream",
        )
