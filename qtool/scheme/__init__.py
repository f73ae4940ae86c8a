"""What a precision is: how many bits, of which kind, with a scale for how much of a tensor. It knows nothing else."""

from __future__ import annotations

from qtool.scheme.description import QuantizationArgs, Scheme, Strategy
from qtool.scheme.presets import PRESETS, W8A8, W8A8_DYNAMIC, name_of

__all__ = ["PRESETS", "W8A8", "W8A8_DYNAMIC", "QuantizationArgs", "Scheme", "Strategy", "name_of"]
