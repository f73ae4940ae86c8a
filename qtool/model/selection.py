"""Which linears of a decoder layer stay float whatever a recipe says, found by structure, and why.

Runtimes build routers and the like as plain matrices: int8 there would not load, or would send tokens to other experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from qtool.checkpoint.formats.fused import fused_name
from qtool.model.architectures import Architecture
from qtool.model.decoder import DecoderStream
from qtool.model.experts import RoutedExperts
from qtool.quant.topology import is_product

NARROW = 32  # inputs or outputs; int8 kernels want multiples of 16, and so little weight saves nothing
ROUTER, SMALL, RECURRENCE = "a router", f"narrower than {NARROW}", "part of a recurrence"
UNUSED, SHARED = "text doesn't go through it", "several layers share it, and runtimes look for scales in each"
OTHER_CLASS = "its class computes more than a product"

# Of the modules beside experts.
_ROUTERS = re.compile(r"router|gate|wg|classifier")


def kept_float(stream: DecoderStream) -> dict[str, str]:
    """Why linears stay float, by the checkpoint's names without ".weight"."""
    found: dict[str, str] = {}
    linears: list[str] = []
    for index in range(stream.depth):
        own, shared = stream.own_parameters(index), stream.shared_parameters(index)
        for name, stored in stream.layer_linears(index).items():
            linears.append(stored)
            if not stream.is_called(index, name):
                found[stored] = UNUSED
            elif f"{name}.weight" in shared:
                found[stored] = SHARED
        for name, why in reasons(stream.skeleton_layer(index), stream.architecture).items():
            if (weight := own.get(f"{name}.weight")) is not None:
                found[weight.removesuffix(".weight")] = why
        for unused in stream.unused_experts(index):
            found |= dict.fromkeys((linear for expert in unused.names for linear in expert), UNUSED)
    # The keys of a single head are narrow, but not together with the queries, as runtimes multiply them.
    wide = {fused_name(name) for name in linears if name not in found}
    return {name: why for name, why in found.items() if why != SMALL or fused_name(name) not in wide - {None}}


def reasons(layer: nn.Module, architecture: Architecture) -> dict[str, str]:
    """Why linears of a decoder layer stay float, by their names inside it."""
    mixtures, recurrent = _mixtures(layer), {*_recurrent(layer)}
    found: dict[str, str] = {}
    for name, linear in layer.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if any(_is_router(name, linear, mixture, count) for mixture, count in mixtures.items()):
            found[name] = ROUTER
        elif not is_product(type(linear)):
            found[name] = OTHER_CLASS
        elif min(linear.in_features, linear.out_features) < NARROW:
            found[name] = SMALL
        elif name in recurrent:
            found[name] = RECURRENCE
        elif (why := architecture.kept_float(name)) is not None:
            found[name] = why
    return found


def _mixtures(layer: nn.Module) -> dict[str, int]:
    """How many routed experts there are, by the name of the module that holds them and their router."""
    found = {}
    for name, module in layer.named_modules():
        fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if isinstance(module, RoutedExperts):
            found[name.rpartition(".")[0]] = len(module.names)
        elif fused and re.search("expert|moe", f"{name}{type(module).__name__}".lower()):
            found[name.rpartition(".")[0]] = fused[0].shape[0]
    return found


def _is_router(name: str, linear: nn.Linear, mixture: str, count: int) -> bool:
    if mixture and not name.startswith(f"{mixture}."):
        return False
    inside = name.removeprefix(f"{mixture}.").split(".")
    if linear.out_features == count and len(inside) <= 2:
        return True
    return any(_ROUTERS.fullmatch(part) for part in inside)


def _recurrent(layer: nn.Module) -> Iterator[str]:
    """Linears that compute the decay, the step or the states of a recurrence: few numbers per head or channel.

    Such a layer has its decay (A_log) or its step's bias as a parameter beside them.
    """
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        decay = own.get("A_log", own.get("dt_bias"))
        if decay is None:
            continue
        linears = {part: child for part, child in module.named_children() if isinstance(child, nn.Linear)}
        if decay.dim() == 2:  # Mamba: a decay for each channel and state
            found = _of_channels(linears, *decay.shape)
        else:
            heads = decay.numel()
            found = [part for part, linear in linears.items() if linear.out_features in (heads, 2 * heads)]
        yield from (f"{name}.{part}" if name else part for part in found)


def _of_channels(linears: dict[str, nn.Linear], channels: int, states: int) -> list[str]:
    """dt_proj, from few numbers to a step for each channel, and x_proj, which makes these and the states' inputs."""
    steps = {
        part: linear.in_features
        for part, linear in linears.items()
        if linear.out_features == channels and linear.in_features < channels // 2
    }
    inputs = {rank + 2 * states for rank in steps.values()}
    return [*steps, *(part for part, linear in linears.items() if linear.out_features in inputs)]
