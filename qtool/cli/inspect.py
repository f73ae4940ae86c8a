"""`qtool inspect`: what is this checkpoint?"""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli.options import Debug, Json, Quiet, console, path_or_stdin

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

_SCHEMES = {"static": "W8A8 static", "dynamic": "W8A8 dynamic"}


def inspect(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A model folder; - reads its path from standard input.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: architecture, format, size, and the scheme of every group of layers.

    Reads headers only, whatever the model's size. Examples:

        qtool inspect SmolLM2-135M-w8a8

        qtool quantize SmolLM2-135M | qtool inspect - --json
    """
    from qtool.checkpoint.reader import Checkpoint

    summary = summarize(Checkpoint.open(path_or_stdin(path)))
    out = console()
    if json or quiet or not sys.stdout.isatty():
        out.result(summary)
        return
    out.table(summary["path"], ["", ""], _facts(summary))
    groups = [(g["layers"], g["count"], g["scheme"], " x ".join(map(str, g["shape"]))) for g in summary["layers"]]
    out.table("Layers", ["layers", "count", "scheme", "shape"], groups)


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `qtool inspect --json` prints, from headers and config alone.

    Keys: path, architecture, model_type, format, dtype, parameters (None where weights are packed in a way qtool
    doesn't know), tensors, files, bytes (of tensors), bytes_on_disk (of their files), bytes_bf16 (the same model in
    bfloat16), and layers: one entry per group of matrices whose names differ in numbers only.
    """
    infos = [checkpoint.info(name) for name in checkpoint.names]
    files = {info.file for info in infos}
    schemes = _schemes(checkpoint)
    parameters = _parameters(checkpoint, schemes)
    architectures = checkpoint.config.get("architectures") or [None]
    return {
        "path": str(checkpoint.path.resolve()),
        "architecture": architectures[0] if isinstance(architectures, list) else str(architectures),
        "model_type": checkpoint.config.get("model_type"),
        "format": checkpoint.format,
        "dtype": _dtype(checkpoint, schemes),
        "parameters": parameters,
        "tensors": len(infos),
        "files": len(files),
        "bytes": checkpoint.nbytes,
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_bf16": None if parameters is None else 2 * parameters,
        "layers": _groups(checkpoint, schemes),
    }


def _schemes(checkpoint: Checkpoint) -> dict[str, str]:
    """Scheme of every matrix, by its layer's name: W8A8 static, W8A8 dynamic, or what its dtype is called."""
    from qtool.checkpoint import formats

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


def _parameters(checkpoint: Checkpoint, schemes: dict[str, str]) -> int | None:
    """Numbers that the float model has: weights and biases, without what quantization added."""
    from qtool.checkpoint import formats

    if checkpoint.format not in ("float", *formats.NAMES):
        return None
    count = 0
    for name in checkpoint.names:
        owner, _, part = name.rpartition(".")
        if schemes.get(owner) not in _SCHEMES.values() or part in ("weight", "bias"):
            count += math.prod(checkpoint.info(name).shape)
    return count


def _dtype(checkpoint: Checkpoint, schemes: dict[str, str]) -> str | None:
    """The dtype of most float weights, as safetensors calls it."""
    from qtool.checkpoint.dtypes import FLOATS

    sizes: dict[str, int] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if info.dtype in FLOATS and schemes.get(name.rpartition(".")[0]) not in _SCHEMES.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda code: sizes[code], default=None)


def _groups(checkpoint: Checkpoint, schemes: dict[str, str]) -> list[dict[str, Any]]:
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, scheme in schemes.items():
        shape = checkpoint.info(f"{name}.weight").shape
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), scheme, shape
        counts[key] = counts.get(key, 0) + 1
    return [
        {"layers": pattern, "count": count, "scheme": scheme, "shape": list(shape)}
        for (pattern, scheme, shape), count in counts.items()
    ]


def _facts(summary: dict[str, Any]) -> list[list[str]]:
    parameters, float_bytes = summary["parameters"], summary["bytes_bf16"]
    facts = {
        "architecture": summary["architecture"],
        "format": summary["format"],
        "dtype": summary["dtype"],
        "parameters": None if parameters is None else f"{parameters:,}",
        "size": f"{_size(summary['bytes_on_disk'])} in {summary['files']} file{'s' if summary['files'] > 1 else ''}",
        "in bfloat16": float_bytes and f"{_size(float_bytes)}, so this is {summary['bytes'] / float_bytes:.0%} of it",
    }
    return [[name, str(value)] for name, value in facts.items() if value]


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
