"""A model folder as MindOne 0.5 (transformers 4.57) reads it: the same weights, an older config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.files import real


def make(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make `folder`, with links to the checkpoint's shards, an index over them, and config.json. Returns it."""
    folder.mkdir()
    files = {checkpoint.info(name).file for name in checkpoint.names}
    for file in files:
        (folder / file.name).symlink_to(real(file))
    index = {
        "metadata": {"total_size": checkpoint.nbytes},
        "weight_map": {name: checkpoint.info(name).file.name for name in checkpoint.names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(older(checkpoint.config)))
    return folder


def older(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with transformers 5's `rope_parameters` as `rope_theta` and `rope_scaling`, which 4.57 reads."""
    result = {name: older(value) if isinstance(value, dict) else value for name, value in config.items()}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        result.setdefault("rope_theta", rope.pop("rope_theta"))
    if rope and rope != {"rope_type": "default"}:
        result.setdefault("rope_scaling", rope)
    return result
