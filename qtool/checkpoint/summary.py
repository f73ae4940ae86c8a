"""What a checkpoint is, from its headers and its config.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Container
from typing import Any

from qtool.checkpoint import formats
from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.reader import Checkpoint

_SCHEMES = {"static": "W8A8 static", "dynamic": "W8A8 dynamic"}


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `qtool inspect --json` prints, from headers and config alone.

    Keys: path, architecture, model_type, format, dtype, parameters (None where weights are packed in a way qtool
    doesn't know), tensors, files, bytes (of tensors), bytes_on_disk (of their files), bytes_bf16 (the same model in
    bfloat16), and layers: one entry per group of matrices whose names differ in numbers only.
    """
    infos = [checkpoint.info(name) for name in checkpoint.names]
    files = {info.file for info in infos}
    found = schemes(checkpoint)
    quantized = {name for name, scheme in found.items() if scheme in _SCHEMES.values()}
    parameters = _parameters(checkpoint, quantized)
    architectures = checkpoint.config.get("architectures") or [None]
    return {
        "path": str(checkpoint.path.resolve()),
        "architecture": architectures[0] if isinstance(architectures, list) else str(architectures),
        "model_type": checkpoint.config.get("model_type"),
        "format": checkpoint.format,
        "dtype": float_dtype(checkpoint, quantized),
        "parameters": parameters,
        "tensors": len(infos),
        "files": len(files),
        "bytes": checkpoint.nbytes,
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_bf16": None if parameters is None else 2 * parameters,
        "layers": _groups(checkpoint, found),
    }


def schemes(checkpoint: Checkpoint) -> dict[str, str]:
    """Scheme of every matrix, by its layer's name: W8A8 static, W8A8 dynamic, or what its dtype is called."""
    known = checkpoint.format in formats.NAMES
    found = {}
    for tensor in checkpoint.names:
        info = checkpoint.info(tensor)
        name = tensor.removesuffix(".weight")
        if name == tensor or len(info.shape) != 2:
            continue
        mode = formats.get(checkpoint.format).mode(checkpoint, name) if known else "float"
        found[name] = _SCHEMES.get(mode or "", info.dtype)
    return found


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


def _parameters(checkpoint: Checkpoint, quantized: Container[str]) -> int | None:
    """Numbers that the float model has: weights and biases, without what quantization added."""
    if checkpoint.format not in ("float", *formats.NAMES):
        return None
    count = 0
    for name in checkpoint.names:
        owner, _, part = name.rpartition(".")
        if owner not in quantized or part in ("weight", "bias"):
            count += math.prod(checkpoint.info(name).shape)
    return count


def _groups(checkpoint: Checkpoint, found: dict[str, str]) -> list[dict[str, Any]]:
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, scheme in found.items():
        shape = checkpoint.info(f"{name}.weight").shape
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), scheme, shape
        counts[key] = counts.get(key, 0) + 1
    return [
        {"layers": pattern, "count": count, "scheme": scheme, "shape": list(shape)}
        for (pattern, scheme, shape), count in counts.items()
    ]
