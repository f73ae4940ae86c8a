"""Which linear layers of a decoder layer share an input, and what a per-channel scale of it folds into.

Found by probing the layer instead of knowing its names: a producer (a norm's gain, or a linear's output)
is multiplied by a distinct factor per channel; if every input channel of some linear then shows exactly
one of those factors, the inverse factor can be folded into that linear for free. This holds for
input norm → q, k, v; v → o, whatever the grouping of heads; post-attention norm → gate, up; up → down;
also for parallel blocks. Of a fused q-k-v or gate-up projection only the last rows produce, those of v
or up (Phi-3, GLM); where heads interleave (GPT-NeoX, DeepSeek's kv_b_proj) it is the last rows of each head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

Probe = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """Where the inverse of a group's smoothing scale goes.

    Attributes:
        producer: the norm or linear, by its name inside the decoder layer.
        channel_map: int64 [in], in main memory wherever the layer is; input channel j of the group is output channel
            channel_map[j] of the producer.
        gain_offset: a norm's output is proportional to (weight + gain_offset): 0 as in Llama, 1 as in Gemma.
    """

    producer: str
    channel_map: torch.Tensor
    gain_offset: float = 0.0


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor, in call order, and what a scale of it folds into, if anything."""

    linears: tuple[str, ...]
    fold: Fold | None = None


def signature(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Equal for layers of equal structure, so that one probe serves all of them."""
    return tuple((name, tensor.shape) for name, tensor in layer.named_parameters())


def linear_layers(layer: nn.Module) -> dict[str, nn.Linear]:
    """Modules that multiply by a matrix and do no more, by their names inside the layer."""
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and is_product(type(module))
    }


def is_product(kind: type[nn.Linear]) -> bool:
    """Whether a class computes what nn.Linear does: Falcon's writes it in another way, Phi-3.5-MoE's router doesn't."""
    if kind.forward is nn.Linear.forward:
        return True
    x, weight = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(-2, 1, 6).reshape(2, 3)
    try:
        with torch.device("meta"):  # filled at random elsewhere, which would move the generator on
            linear = kind(3, 2, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        output = linear(x)
        return isinstance(output, torch.Tensor) and torch.allclose(output, nn.functional.linear(x, weight))
    except (TypeError, ValueError, AttributeError, RuntimeError):  # built in another way, so it is another thing
        return False


@torch.no_grad()
def find_groups(layer: nn.Module, run: Probe, heads: int = 1) -> list[Group]:
    """Group the linears of `layer` by shared input and find the producer of each group.

    Args:
        layer: with float32 weights.
        run: calls the layer on a few tokens, always the same, and returns its output.
        heads: attention heads, whose rows may interleave in a fused projection.

    Returns:
        Groups in call order; every linear that is called is in exactly one.
    """
    linears = linear_layers(layer)
    base, reference = _linear_inputs(linears, run)
    shared: list[list[str]] = []
    for name, x in base.items():
        for names in shared:
            first = base[names[0]]
            if first.shape == x.shape and first.data_ptr() == x.data_ptr():
                names.append(name)
                break
        else:
            shared.append([name])

    found = {tuple(names): Group(tuple(names)) for names in shared}
    if not torch.isfinite(reference).all():
        return list(found.values())  # made-up hidden states are too much for this layer: nothing is known of its scales
    for producer, channels in _producers(layer, {x.shape[-1] for x in base.values()}, heads):
        count = len(channels)
        open_groups = [
            members
            for members in found
            if found[members].fold is None and producer not in members and base[members[0]].shape[-1] % count == 0
        ]
        if not open_groups:
            continue
        factors = torch.ones(weight_of(layer, producer).shape[0], dtype=torch.float64)
        factors[channels] += torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
        with _scaled_output(layer.get_submodule(producer), factors):
            seen, _ = _linear_inputs(linears, run)
        for members in open_groups:
            position = _match(base[members[0]], seen[members[0]], count)
            if position is None:
                continue
            candidate = Group(members, Fold(producer, channels[position], _gain_offset(layer, producer, run)))
            if _is_neutral(layer, candidate, factors, run, reference):
                found[members] = candidate
    return list(found.values())


@torch.no_grad()
def fold(layer: nn.Module, group: Group, s: torch.Tensor) -> None:
    """Multiply the group's weights by s [in] per input channel and divide the producer's output by it, in place."""
    target = group.fold
    if target is None:
        raise ValueError(f"{group.linears} has no producer to fold into")
    for name in group.linears:
        weight_of(layer, name).mul_(s)
    weight, bias = weight_of(layer, target.producer), bias_of(layer, target.producer)
    inverse = torch.ones(weight.shape[0], dtype=s.dtype, device=s.device)
    inverse[target.channel_map] = 1 / s
    if weight.dim() == 2:
        weight.mul_(inverse[:, None])
    else:
        weight.add_(target.gain_offset).mul_(inverse).sub_(target.gain_offset)
    if bias is not None:
        bias.mul_(inverse)


def weight_of(layer: nn.Module, name: str) -> torch.Tensor:
    """The weight of a linear or norm inside `layer`."""
    return layer.get_submodule(name).get_parameter("weight")


def bias_of(layer: nn.Module, name: str) -> torch.Tensor | None:
    bias = getattr(layer.get_submodule(name), "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


def per_producer_channel(target: Fold, values: torch.Tensor) -> torch.Tensor:
    """Maximum over the input channels that share a producer channel, given back to each of them.

    This is what makes one s per key-value channel out of the query heads that read it.
    """
    channels = target.channel_map.to(values.device)
    pooled = torch.zeros(int(target.channel_map.max()) + 1, dtype=values.dtype, device=values.device)
    pooled.scatter_reduce_(0, channels, values, "amax", include_self=False)
    return pooled[channels]


def _linear_inputs(linears: dict[str, nn.Linear], run: Probe) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name, linear in linears.items():

            def keep(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                inputs[name] = args[0]

            stack.callback(linear.register_forward_pre_hook(keep).remove)
        output = run()
    return inputs, output


def _producers(layer: nn.Module, consumer_widths: set[int], heads: int) -> list[tuple[str, torch.Tensor]]:
    """What may end in a per-channel gain: norms with a 1-D weight, linears, last rows of a linear or of its heads.

    Returns:
        (name, the channels that count, int64); whole outputs first. For a consumer of width n the last rows are those
        of up in a fused [gate, up], or of v in a fused [q, k, v] with n channels of q; or n / heads of each head.
    """
    widths: dict[str, int] = {}
    linears = linear_layers(layer)
    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not name:
            continue
        if name in linears or weight.dim() == 1:
            widths[name] = weight.shape[0]
    whole = [(name, torch.arange(width)) for name, width in widths.items()]
    tails = []
    for name, width in widths.items():
        if not isinstance(layer.get_submodule(name), nn.Linear):
            continue
        for n in sorted(consumer_widths):
            parts = [(1, n), (1, (width - n) // 2)]
            if heads > 1 and width % heads == 0 and n % heads == 0:
                parts.append((heads, n // heads))
            for blocks, tail in dict.fromkeys(parts):
                if 0 < tail < width // blocks:
                    tails.append((name, torch.arange(width).reshape(blocks, -1)[:, -tail:].flatten()))
    tails.sort(key=lambda tail: len(tail[1]) not in consumer_widths)  # the likely ones first
    return [*whole, *tails]


def _scaled_output(module: nn.Module, factors: torch.Tensor) -> ExitStack:
    stack = ExitStack()
    stack.callback(module.register_forward_hook(lambda _m, _a, out: out * factors.to(out.dtype).to(out.device)).remove)
    return stack


def _match(base: torch.Tensor, seen: torch.Tensor, width: int) -> torch.Tensor | None:
    """For each channel the index of the factor by which it grew, in main memory; None if any channel shows none."""
    base, seen = (x.reshape(-1, x.shape[-1]).cpu().double() for x in (base, seen))
    top = base.abs().argmax(dim=0, keepdim=True)
    ratio = (seen.gather(0, top) / base.gather(0, top))[0]
    position = (ratio - 1) * (width + 1) - 1
    index = position.round()
    if not torch.isfinite(position).all() or ((position - index).abs() > 0.1).any():
        return None
    if index.min() < 0 or index.max() >= width:
        return None
    return index.long()


def _gain_offset(layer: nn.Module, producer: str, run: Probe) -> float:
    """0 if a zero weight silences the norm, 1 if it is the norm's neutral element."""
    if isinstance(layer.get_submodule(producer), nn.Linear):
        return 0.0
    weight, bias = weight_of(layer, producer), bias_of(layer, producer)
    peaks: list[float] = []
    saved = weight.clone()
    handle = layer.get_submodule(producer).register_forward_hook(
        lambda _m, _a, out: peaks.append(float((out - (0 if bias is None else bias)).abs().max()))
    )
    try:
        weight.zero_()
        run()
    finally:
        weight.copy_(saved)
        handle.remove()
    return 0.0 if peaks[0] == 0 else 1.0


def _is_neutral(layer: nn.Module, group: Group, factors: torch.Tensor, run: Probe, reference: torch.Tensor) -> bool:
    """Compare the layer's output as if the factors were folded: catches producers that something else reads too."""
    assert group.fold is not None
    channels = group.fold.channel_map.to(reference.device)
    s = factors[group.fold.channel_map].to(reference.dtype).to(reference.device)
    weight = weight_of(layer, group.fold.producer)
    inverse = torch.ones_like(weight[:, 0] if weight.dim() == 2 else weight)
    inverse[channels] = 1 / s
    with ExitStack() as stack:
        stack.enter_context(_scaled_output(layer.get_submodule(group.fold.producer), inverse))
        for name in group.linears:
            hook = layer.get_submodule(name).register_forward_pre_hook(lambda _m, args: (args[0] * s,))
            stack.callback(hook.remove)
        changed = run()
    return torch.allclose(changed, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
