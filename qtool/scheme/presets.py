"""Schemes by their usual names. A new precision is one more row."""

from __future__ import annotations

from qtool.scheme.description import QuantizationArgs, Scheme

_INT8_PER_CHANNEL = QuantizationArgs(strategy="channel")

W8A8 = Scheme(_INT8_PER_CHANNEL, QuantizationArgs(strategy="tensor", symmetric=False))
"""int8 weights per output channel; int8 activations with one scale and zero point from calibration."""

W8A8_DYNAMIC = Scheme(_INT8_PER_CHANNEL, QuantizationArgs(strategy="token", dynamic=True))
"""int8 weights per output channel; int8 activations with a scale per token, found at run time."""

PRESETS = {"W8A8": W8A8, "W8A8-dynamic": W8A8_DYNAMIC}


def name_of(scheme: Scheme) -> str | None:
    """The usual name of a scheme; None where it has none."""
    return next((name for name, preset in PRESETS.items() if preset == scheme), None)
