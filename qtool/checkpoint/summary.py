"""What a checkpoint is, from its headers and its config.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from typing import Any

from qtool.checkpoint import formats
from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.formats import Format, QuantizedFormat
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.scheme import Scheme, cache_name


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `qtool inspect --json` prints, from headers and config alone.

    Keys: path, architecture, model_type, format, dtype, parameters (None where weights are packed in a way qtool
    doesn't know), tensors, files, bytes (of tensors), bytes_on_disk (of their files), bytes_bf16 (the same model in
    bfloat16), kv_cache (how keys and values are kept; None for floats), and layers: one entry per group of matrices
    whose names differ in numbers only.
    """
    infos = [checkpoint.info(name) for name in checkpoint.names]
    files = {info.file for info in infos}
    format = formats.of(checkpoint)
    found = schemes(checkpoint)
    quantized = {name: scheme for name, scheme in found.items() if scheme is not None}
    # Other formats have scales that count for nothing.
    counted = isinstance(format, formats.QuantizedFormat) or format is formats.PLAIN
    parameters = _parameters(checkpoint, format, quantized) if counted else None
    architectures = checkpoint.config.get("architectures") or [None]
    return {
        "path": str(checkpoint.path.resolve()),
        "architecture": architectures[0] if isinstance(architectures, list) else str(architectures),
        "model_type": checkpoint.config.get("model_type"),
        "format": format.name,
        "dtype": float_dtype(checkpoint, quantized),
        "parameters": parameters,
        "tensors": len(infos),
        "files": len(files),
        "bytes": checkpoint.nbytes,
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_bf16": None if parameters is None else 2 * parameters,
        "kv_cache": kept_cache(checkpoint),
        "layers": _groups(checkpoint, format, found),
    }


def kept_cache(checkpoint: Checkpoint) -> str | None:
    """How keys and values are kept, by its name in `qtool.scheme.CACHES`; None for floats.

    "unknown" is a way that qtool can't read.
    """
    try:
        args = formats.of(checkpoint).cache_scheme(checkpoint)
    except formats.UnknownScheme:
        return "unknown"
    return None if args is None else cache_name(args)


def schemes(checkpoint: Checkpoint) -> dict[str, Scheme | None]:
    """Scheme of every matrix, by its layer's name; None where it is float, or quantized in a way that qtool can't read.

    Raises InputError for a description that makes no sense.
    """
    format = formats.of(checkpoint)
    found: dict[str, Scheme | None] = {}
    for name in format.layers(checkpoint):
        try:
            found[name] = format.scheme(checkpoint, name)
        except formats.UnknownScheme:
            found[name] = None
    return found


def quantized_layers(source: Checkpoint, form: QuantizedFormat) -> dict[str, Scheme]:
    """The scheme of every quantized layer, none of which is damaged or unknown.

    Raises InputError for layers that can't be read as a whole.
    """
    schemes: dict[str, Scheme] = {}
    for name in form.layers(source):
        if scheme := form.scheme(source, name):
            form.shape(Stored(source, name), scheme)
            schemes[name] = scheme
    if not schemes:
        raise InputError("no layer of this model is quantized", where=str(source.path))
    for tensor in source.names:
        owner, _, part = tensor.rpartition(".")
        stored = Stored(source, owner)
        if owner not in schemes and part == "weight" and source.info(tensor).dtype == "I8":
            raise stored.error("its weight is int8, but nothing says how it is quantized")
        if owner in schemes and part not in form.parts | form.cache_parts:
            raise stored.error(f"has a tensor {part!r}, which is none of {form.name}'s that qtool knows")
    return schemes


def float_dtype(checkpoint: Checkpoint, quantized: Container[str]) -> str | None:
    """The dtype of most bytes of float weights, as safetensors calls it; None when there are none.

    `quantized` holds the layers whose tensors don't count, by their names without ".weight".
    """
    sizes: dict[str, int] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if info.dtype in FLOATS and name.rpartition(".")[0] not in quantized:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda code: sizes[code], default=None)


def _parameters(checkpoint: Checkpoint, format: Format, quantized: Mapping[str, Scheme]) -> int:
    """Numbers that the float model has: weights and biases, without what quantization added."""
    count = sum(math.prod(_shape(checkpoint, format, name, scheme)) for name, scheme in quantized.items())
    for name in checkpoint.names:
        owner, _, part = name.rpartition(".")
        if (owner not in quantized or part == "bias") and part not in format.cache_parts:
            count += math.prod(checkpoint.info(name).shape)
    return count


def _groups(checkpoint: Checkpoint, format: Format, found: Mapping[str, Scheme | None]) -> list[dict[str, Any]]:
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, scheme in found.items():
        label = scheme.label if scheme else format.weight(checkpoint, name).dtype
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), label, _shape(checkpoint, format, name, scheme)
        counts[key] = counts.get(key, 0) + 1
    return [
        {"layers": pattern, "count": count, "scheme": label, "shape": list(shape)}
        for (pattern, label, shape), count in counts.items()
    ]


def _shape(checkpoint: Checkpoint, format: Format, name: str, scheme: Scheme | None) -> tuple[int, ...]:
    """Of the float weight."""
    if scheme is None:
        return format.weight(checkpoint, name).shape
    assert isinstance(format, QuantizedFormat)
    return format.shape(Stored(checkpoint, name), scheme)
