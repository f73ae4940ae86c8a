"""What a precision is: how many bits, of which kind, with a scale for how much of a tensor. It knows nothing else."""

from __future__ import annotations

from qtool.scheme.description import QuantizationArgs, Scheme, Strategy
from qtool.scheme.presets import (
    CACHES,
    FP8_BLOCK,
    FP8_CACHE,
    FP8_DYNAMIC,
    INT8_CACHE,
    PRESETS,
    W4A8,
    W4A16,
    W4A16_ASYMMETRIC,
    W8A8,
    W8A8_ASYMMETRIC,
    W8A8_DYNAMIC,
    W8A16,
    cache_name,
    name_of,
    named,
)

__all__ = [
    "CACHES",
    "FP8_BLOCK",
    "FP8_CACHE",
    "FP8_DYNAMIC",
    "INT8_CACHE",
    "PRESETS",
    "W4A8",
    "W4A16",
    "W4A16_ASYMMETRIC",
    "W8A8",
    "W8A8_ASYMMETRIC",
    "W8A8_DYNAMIC",
    "W8A16",
    "QuantizationArgs",
    "Scheme",
    "Strategy",
    "cache_name",
    "name_of",
    "named",
]
