"""What a report says about a quantized model besides the comparison: its groups of linears, and where its bytes are."""

from __future__ import annotations

import re
from typing import Any

from qtool.checkpoint import formats
from qtool.checkpoint.reader import REPORT, Checkpoint
from qtool.files import read_json

_OUTSIDE = re.compile(r"embed|wte|lm_head|output")
_NUMBERED = re.compile(r"\.\d+\.")
_BESIDES = re.compile(r"scale|zero|bias|norm|shape|g_idx|offset")  # a tensor's last name, if it is no weight
_FLOAT = ("BF16", "F16", "F32", "F64")
_MADE = ("recipe", "scheme", "engine", "qtool")


def groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The rows "layers" of qtool.json: how each group of linears came out. Empty for a model without it.

    What an engine doesn't measure of a group (relative_error: mindspore-gs) or choose for it (alpha) is None.

    Raises:
        InputError: the file is damaged.
    """
    file = checkpoint.path / REPORT
    rows = read_json(file).get("layers") if file.is_file() else None
    needed = {"layer", "linears", "activations"}
    return [
        {"alpha": None, "relative_error": None, **row}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and needed <= row.keys()
    ]


def made(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a model was quantized, by its qtool.json: names of recipe, scheme and engine, and qtool's version.

    What nobody says is None.

    Raises:
        InputError: the file is damaged.
    """
    file = checkpoint.path / REPORT
    told = read_json(file) if file.is_file() else {}
    found = {"format": formats.of(checkpoint).name} | {key: told.get(key) for key in _MADE}
    if isinstance(found["recipe"], dict):  # all of it; its name says enough
        found["recipe"] = found["recipe"].get("name")
    return found


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the checkpoint's tensors, by what they are. Weights are matrices, or experts in one tensor."""
    found = {"embeddings, output": 0, "float weights": 0, "quantized weights": 0, "scales, norms, biases": 0}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if not _NUMBERED.search(name) and _OUTSIDE.search(name):
            kind = "embeddings, output"
        elif len(info.shape) < 2 or _BESIDES.search(name.rpartition(".")[2]):
            kind = "scales, norms, biases"
        else:
            kind = "float weights" if info.dtype in _FLOAT else "quantized weights"
        found[kind] += info.nbytes
    return found
