"""Schemes by their usual names. A new precision is one more row."""

from __future__ import annotations

import re
from dataclasses import replace

from qtool.scheme.description import QuantizationArgs, Scheme

_INT8_PER_CHANNEL = QuantizationArgs(strategy="channel")
_INT4_PER_GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
_INT8_PER_TOKEN = QuantizationArgs(strategy="token", dynamic=True)

W8A8 = Scheme(_INT8_PER_CHANNEL, QuantizationArgs(strategy="tensor", symmetric=False))
"""int8 weights per output channel; int8 activations with one scale and zero point from calibration."""

W8A8_DYNAMIC = Scheme(_INT8_PER_CHANNEL, _INT8_PER_TOKEN)
"""int8 weights per output channel; int8 activations with a scale per token, found at run time."""

W8A8_ASYMMETRIC = Scheme(_INT8_PER_CHANNEL, QuantizationArgs(strategy="token", symmetric=False, dynamic=True))
"""The same with a zero point per token besides: integers span a token's least number to its largest."""

W8A16 = Scheme(_INT8_PER_CHANNEL, None)
"""int8 weights per output channel; float activations."""

W4A16 = Scheme(_INT4_PER_GROUP, None)
"""int4 weights, 128 input channels of an output channel with one scale; float activations."""

W4A16_ASYMMETRIC = Scheme(replace(_INT4_PER_GROUP, symmetric=False), None)
"""The same with a zero point for each scale: integers span a group's least weight to its largest."""

W4A8 = Scheme(_INT4_PER_GROUP, _INT8_PER_TOKEN)
"""int4 weights as in W4A16; int8 activations with a scale per token, found at run time."""

FP8_DYNAMIC = Scheme(
    QuantizationArgs(type="float", strategy="channel"), QuantizationArgs(type="float", strategy="token", dynamic=True)
)
"""e4m3 weights per output channel; e4m3 activations with a scale per token, found at run time."""

FP8_BLOCK = Scheme(
    QuantizationArgs(type="float", strategy="block", block_structure=(128, 128)),
    QuantizationArgs(type="float", strategy="group", group_size=128, dynamic=True),
)
"""e4m3 weights, blocks of 128 x 128 with one scale; e4m3 activations with a scale for 128 channels of a token."""

FP8_CACHE = QuantizationArgs(type="float", strategy="tensor")
"""e4m3 keys and values in the cache, each with one scale for a layer, from calibration."""

INT8_CACHE = QuantizationArgs(strategy="channel", symmetric=False)
"""int8 keys and values in the cache, with a scale and a zero point for each channel of a head, from calibration."""

CACHES = {"fp8": FP8_CACHE, "int8": INT8_CACHE}
"""What keys and values can be kept as, by its name."""

PRESETS = {
    "W8A8": W8A8,
    "W8A8-dynamic": W8A8_DYNAMIC,
    "W8A8-asymmetric": W8A8_ASYMMETRIC,
    "W8A16": W8A16,
    "W4A16": W4A16,
    "W4A16-asymmetric": W4A16_ASYMMETRIC,
    "W4A8": W4A8,
    "FP8-dynamic": FP8_DYNAMIC,
    "FP8-block": FP8_BLOCK,
}

_SHARED = re.compile(r"(?P<name>.+)-(?:g(?P<size>[1-9]\d{0,5})|channel)", re.IGNORECASE)


def name_of(scheme: Scheme) -> str | None:
    """The usual name of a scheme; None where it has none."""
    return next((name for name, preset in PRESETS.items() if preset == scheme), None)


def cache_name(args: QuantizationArgs) -> str:
    """What `CACHES` calls this way to keep keys and values. Raises KeyError for another."""
    return {known: name for name, known in CACHES.items()}[args]


def named(name: str) -> Scheme | None:
    """The scheme of a usual name, in any case; None for an unknown one.

    An integer one may say who shares a scale of the weights: W4A16-g64 (groups of 64 input channels) or W4A16-channel;
    W4A16-asymmetric-g64.
    """
    presets = {known.lower(): scheme for known, scheme in PRESETS.items()}
    if found := presets.get(name.lower()):
        return found
    match = _SHARED.fullmatch(name)
    base = presets.get(match["name"].lower()) if match else None
    if match is None or base is None or base.weights.type != "int":
        return None
    size = int(match["size"]) if match["size"] else None
    weights = replace(base.weights, strategy="channel" if size is None else "group", group_size=size)
    return replace(base, weights=weights)
