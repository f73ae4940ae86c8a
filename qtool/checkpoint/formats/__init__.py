"""The checkpoint formats that qtool writes and reads, by name."""

from __future__ import annotations

from qtool.checkpoint.formats.common import Description, Format, Mode, Problem
from qtool.checkpoint.formats.compressed_tensors import CompressedTensors
from qtool.checkpoint.formats.golden_stick import GoldenStick
from qtool.checkpoint.formats.modelslim import ModelSlim
from qtool.checkpoint.formats.safetensors import Safetensors
from qtool.errors import InputError

_FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "golden-stick": GoldenStick(),
    "modelslim": ModelSlim(),
    "safetensors": Safetensors(),
}

NAMES = ("compressed-tensors", "golden-stick", "modelslim")
"""The quantized ones."""

__all__ = ["NAMES", "Description", "Format", "Mode", "Problem", "get"]


def get(name: str) -> Format:
    """A format by its name; "safetensors" is the plain float one. Raises InputError for an unknown name."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise InputError(f"unknown format {name!r}", hint=f"Formats: {', '.join(_FORMATS)}.") from None
