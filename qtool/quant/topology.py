"""Which linear layers of a decoder layer share an input, and what a per-channel scale of it folds into.

Found by probing the layer instead of knowing its names: a producer (a norm's gain, or a linear's output)
is multiplied by a distinct factor per channel; if every input channel of some linear then shows exactly
one of those factors, the inverse factor can be folded into that linear for free. This holds for
input norm → q, k, v; v → o, whatever the grouping of heads; post-attention norm → gate, up; up → down;
also for fused projections and parallel blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

Probe = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor.

    Attributes:
        linears: names inside the decoder layer, in call order.
        producer: the module into which 1/s folds, or None when there is none.
        channel_map: int64 [in]; input channel j of the linears is output channel channel_map[j] of the producer.
        gain_offset: for a norm, its output is proportional to (weight + gain_offset): 0 as in Llama, 1 as in Gemma.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    channel_map: torch.Tensor | None = None
    gain_offset: float = 0.0


def signature(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Equal for layers of equal structure, so that one probe serves all of them."""
    return tuple((name, tensor.shape) for name, tensor in layer.named_parameters())


def linear_layers(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def find_groups(layer: nn.Module, run: Probe) -> list[Group]:
    """Group the linears of `layer` by shared input and find the producer of each group.

    Args:
        layer: with float32 weights.
        run: calls the layer on a few tokens, always the same, and returns its output.

    Returns:
        Groups in call order; every linear that is called is in exactly one.
    """
    linears = linear_layers(layer)
    base, reference = _linear_inputs(linears, run)
    groups: list[list[str]] = []
    for name, x in base.items():
        for group in groups:
            first = base[group[0]]
            if first.shape == x.shape and first.data_ptr() == x.data_ptr():
                group.append(name)
                break
        else:
            groups.append([name])

    found: dict[tuple[str, ...], Group] = {tuple(g): Group(tuple(g)) for g in groups}
    for producer, width in _producers(layer).items():
        factors = 1 + torch.arange(1, width + 1, dtype=torch.float64) / (width + 1)
        with _scaled_output(layer.get_submodule(producer), factors):
            seen, _ = _linear_inputs(linears, run)
        for names, group in found.items():
            if group.producer is not None or producer in names:
                continue
            channel_map = _match(base[names[0]], seen[names[0]], width)
            if channel_map is None:
                continue
            candidate = Group(names, producer, channel_map, _gain_offset(layer.get_submodule(producer), run))
            if _is_neutral(layer, candidate, factors, run, reference):
                found[names] = candidate
    return list(found.values())


@torch.no_grad()
def fold(layer: nn.Module, group: Group, s: torch.Tensor) -> None:
    """Multiply the group's weights by s [in] per input channel and divide the producer's output by it, in place."""
    if group.producer is None or group.channel_map is None:
        raise ValueError(f"{group.linears} has no producer to fold into")
    for name in group.linears:
        layer.get_submodule(name).weight.mul_(s)
    producer = layer.get_submodule(group.producer)
    inverse = torch.ones(producer.weight.shape[0], dtype=s.dtype, device=s.device)
    inverse[group.channel_map] = 1 / s
    if isinstance(producer, nn.Linear):
        producer.weight.mul_(inverse[:, None])
    else:
        producer.weight.add_(group.gain_offset).mul_(inverse).sub_(group.gain_offset)
    if getattr(producer, "bias", None) is not None:
        producer.bias.mul_(inverse)


def per_producer_channel(group: Group, values: torch.Tensor) -> torch.Tensor:
    """Maximum over the input channels that share a producer channel, given back to each of them.

    This is what makes one s per key-value channel out of the query heads that read it.
    """
    assert group.channel_map is not None
    width = int(group.channel_map.max()) + 1
    pooled = torch.zeros(width, dtype=values.dtype, device=values.device)
    pooled.scatter_reduce_(0, group.channel_map, values, "amax", include_self=False)
    return pooled[group.channel_map]


def _linear_inputs(linears: dict[str, nn.Linear], run: Probe) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name, linear in linears.items():

            def keep(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                inputs[name] = args[0]

            stack.callback(linear.register_forward_pre_hook(keep).remove)
        output = run()
    return inputs, output


def _producers(layer: nn.Module) -> dict[str, int]:
    """Modules that end in a per-channel gain: norms with a 1-D weight, and linears; with their output width."""
    widths: dict[str, int] = {}
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or not name:
            continue
        if isinstance(module, nn.Linear) or weight.dim() == 1:
            widths[name] = weight.shape[0]
    return widths


def _scaled_output(module: nn.Module, factors: torch.Tensor) -> ExitStack:
    stack = ExitStack()
    stack.callback(module.register_forward_hook(lambda _m, _a, out: out * factors.to(out)).remove)
    return stack


def _match(base: torch.Tensor, seen: torch.Tensor, width: int) -> torch.Tensor | None:
    """For each channel the index of the factor by which it grew, or None if any channel shows none."""
    base, seen = base.reshape(-1, base.shape[-1]).double(), seen.reshape(-1, base.shape[-1]).double()
    top = base.abs().argmax(dim=0, keepdim=True)
    ratio = (seen.gather(0, top) / base.gather(0, top))[0]
    position = (ratio - 1) * (width + 1) - 1
    index = position.round()
    if not torch.isfinite(position).all() or ((position - index).abs() > 0.1).any():
        return None
    if index.min() < 0 or index.max() >= width:
        return None
    return index.long()


def _gain_offset(producer: nn.Module, run: Probe) -> float:
    """0 if a zero weight silences the norm, 1 if it is the norm's neutral element."""
    if isinstance(producer, nn.Linear):
        return 0.0
    peak: list[float] = []
    saved = producer.weight.detach().clone()
    bias = getattr(producer, "bias", None)
    handle = producer.register_forward_hook(
        lambda _m, _a, out: peak.append(float((out - (0 if bias is None else bias)).abs().max()))
    )
    try:
        producer.weight.zero_()
        run()
    finally:
        producer.weight.copy_(saved)
        handle.remove()
    return 0.0 if peak[0] == 0 else 1.0


def _is_neutral(layer: nn.Module, group: Group, factors: torch.Tensor, run: Probe, reference: torch.Tensor) -> bool:
    """Fold, compare the layer's output, unfold: catches producers that something else reads as well."""
    assert group.channel_map is not None and group.producer is not None
    s = factors.to(reference)[group.channel_map]
    names = (*group.linears, group.producer)
    saved = {n: {k: p.detach().clone() for k, p in layer.get_submodule(n).named_parameters()} for n in names}
    try:
        fold(layer, group, s)
        changed = run()
    finally:
        for n in names:
            for key, parameter in layer.get_submodule(n).named_parameters():
                parameter.copy_(saved[n][key])
    return torch.allclose(changed, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
