"""The GGUF file that llama.cpp reads of a checkpoint: made in qtool's cache, by itself or before answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.files import check_free_space, disk_errors, sync
from qtool.gguf.layers import Layers
from qtool.gguf.writer import write
from qtool.workers import Report, hide_media_packages


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Make `job["file"]` of the checkpoint `job["model"]`. The result is empty; errors are those of `make`."""
    hide_media_packages()
    make(Path(job["model"]), Path(job["file"]), report)
    return {}


def make(model: Path, file: Path, report: Report) -> None:
    """Write `file`, whole or not at all.

    Raises:
        InputError: a model that llama.cpp doesn't know.
        QtoolError: the disk is full.
    """
    layers = Layers(Checkpoint.open(model))
    file.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(file, layers.source.nbytes, "the cache, XDG_CACHE_HOME")
    new = file.with_name(f".{os.getpid()}.gguf")
    try:
        with disk_errors(file, layers.source.nbytes):
            write(layers, new, report)
            sync(new)
            new.replace(file)
    finally:
        new.unlink(missing_ok=True)
