"""Worker: a checkpoint to a GGUF file."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.companions import companions
from qtool.checkpoint.reader import Checkpoint
from qtool.conversion.job import FormatJob
from qtool.files import check_free_space, disk_errors, draft, sync
from qtool.gguf.layers import Layers
from qtool.gguf.writer import write
from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a `FormatJob` whose `to` is gguf: its `output` is a file.

    Returns:
        from, to, layers (how many by their scheme's label), integers (how many were carried over as they are),
        rounded (names of tensors that were rounded anew), scale_rounding (the largest relative change of a scale,
        which is float16 there), nbytes (of the file), seconds, output.

    Raises:
        InputError: not a checkpoint, a format that qtool doesn't read, or a model that llama.cpp doesn't know.
        QtoolError: the disk is full.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    hide_media_packages()
    started, wanted = time.perf_counter(), FormatJob(**job)
    report.progress("starting", 0, 0)
    source, output = Checkpoint.open(wanted.source), Path(wanted.output)
    companions(source)
    layers = Layers(source)
    check_free_space(output, source.nbytes + source.nbytes // 10)
    new = draft(output)
    try:
        with disk_errors(output, source.nbytes):
            found = write(layers, new, report)
            sync(new)
            nbytes = new.stat().st_size
            new.replace(output)
    finally:
        new.unlink(missing_ok=True)
    labels = Counter(scheme.label for scheme in layers.schemes.values())
    return {
        "from": layers.format.name,
        "to": "gguf",
        "layers": dict(labels),
        "integers": found.integers,
        "rounded": found.rounded,
        "scale_rounding": found.scale_rounding,
        "nbytes": nbytes,
        "seconds": round(time.perf_counter() - started, 2),
        "output": wanted.output,
    }
