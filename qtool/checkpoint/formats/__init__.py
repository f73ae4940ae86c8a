"""The checkpoint formats. A new one is a file in this package, and its line in FORMATS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qtool.checkpoint.formats.awq import Awq
from qtool.checkpoint.formats.base import (
    CachingFormat,
    Description,
    Format,
    Holding,
    Inexpressible,
    PackedFormat,
    QuantizedFormat,
    UnknownScheme,
    Writable,
    quantization_method,
)
from qtool.checkpoint.formats.compressed_tensors import CompressedTensors
from qtool.checkpoint.formats.fp8 import Fp8
from qtool.checkpoint.formats.golden_stick import GoldenStick
from qtool.checkpoint.formats.gptq import Gptq
from qtool.checkpoint.formats.modelslim import ModelSlim
from qtool.checkpoint.formats.mxfp4 import Mxfp4
from qtool.checkpoint.formats.plain import Plain
from qtool.checkpoint.formats.unknown import Unknown
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

PLAIN = Plain()

FORMATS: tuple[Format, ...] = (
    CompressedTensors(),
    GoldenStick(),
    ModelSlim(),
    PLAIN,
    Fp8(),
    Mxfp4(),
    Gptq(),
    Awq(),
)

_QUANTIZED = {each.name: each for each in FORMATS if isinstance(each, QuantizedFormat)}

NAMES = tuple(_QUANTIZED)
"""Of those that hold quantized models."""

_EXPORTED = {each.name: each for each in FORMATS if isinstance(each, Holding) and each.name not in _QUANTIZED}

EXPORTS = tuple(_EXPORTED)
"""Of those that a quantized checkpoint can be converted to, and that are read as float models."""

DEQUANTIZED = "bfloat16"
"""What a quantized checkpoint can be converted to besides: the float model that its integers stand for."""

TARGETS = (*NAMES, *EXPORTS, DEQUANTIZED)

DESCRIPTION_FILES = frozenset(file for each in FORMATS for file in each.files)
"""Files that belong to a format, and not to the model."""

# The same as types, for the command line and for recipes.
if TYPE_CHECKING:
    Name = str
    Target = str
else:
    Name = Literal[NAMES]
    Target = Literal[TARGETS]

__all__ = [
    "DEQUANTIZED",
    "DESCRIPTION_FILES",
    "EXPORTS",
    "FORMATS",
    "NAMES",
    "PLAIN",
    "TARGETS",
    "CachingFormat",
    "Description",
    "Format",
    "Holding",
    "Inexpressible",
    "Name",
    "PackedFormat",
    "QuantizedFormat",
    "Target",
    "UnknownScheme",
    "Writable",
    "get",
    "of",
    "target",
]


def get(name: str) -> QuantizedFormat:
    """A format for quantized models by its name. Raises InputError for an unknown one."""
    try:
        return _QUANTIZED[name]
    except KeyError:
        raise InputError(f"unknown format {name!r}", hint=f"Formats: {', '.join(NAMES)}.") from None


def target(name: str) -> Holding:
    """A format that a quantized checkpoint can be converted to, by its name. Raises InputError for an unknown one."""
    return _EXPORTED.get(name) or get(name)


def of(checkpoint: Checkpoint) -> Format:
    """The format of a folder; one that reads nothing where qtool doesn't know it."""
    found = [each for each in FORMATS if each.detect(checkpoint.config, checkpoint.files)]
    # A description file counts for more than config.json, in which its maker may have left an older method.
    found.sort(key=lambda each: not each.files)
    if found:
        return found[0]
    method = quantization_method(checkpoint.config) or "unknown"
    return Unknown(method, hint=f"It reads float models and {', '.join(NAMES)}.")
