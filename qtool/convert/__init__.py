"""Between checkpoint formats, and from GGUF files. The work is done in workers; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.engines import native
from qtool.environments.lookup import interpreter

OnEvent = Callable[[workers.Event], None]


def from_gguf(source: Path, output: Path, dtype: str, *, overwrite: bool, on_event: OnEvent) -> dict[str, Any]:
    """Make `output` a Hugging Face checkpoint of a GGUF file, its parameters in `dtype`; see `convert.gguf.main`.

    Raises:
        InputError, QtoolError: as the worker does, or the output is there already and `overwrite` is off.
    """
    from qtool.checkpoint.storage import PartialFolder, check_output, tidy
    from qtool.files import disk_errors

    output = output.absolute()
    tidy(output)
    check_output(output, overwrite=overwrite, source=source)
    python = interpreter("native")
    partial = PartialFolder(output)
    try:
        job = {"source": str(source.absolute()), "folder": str(partial.path), "output": str(output), "dtype": dtype}
        result = workers.run("qtool.convert.gguf", job, python=python, on_event=on_event)
        with disk_errors(output, result["nbytes"]):
            partial.commit(overwrite=overwrite)
    finally:
        partial.discard()
    return {"output": str(output), "dtype": dtype, **result}


def to_format(source: Path, output: Path, to: str, *, overwrite: bool, on_event: OnEvent) -> dict[str, Any]:
    """Make `output` the W8A8 checkpoint `source` in another format; see `convert.checkpoint.main`.

    Raises:
        InputError, QtoolError: as the worker does, or the output is there already and `overwrite` is off.
    """
    from qtool.checkpoint.storage import check_output, tidy

    output = output.absolute()
    tidy(output)
    check_output(output, overwrite=overwrite, source=source)
    job = {"source": str(source.absolute()), "output": str(output), "to": to, "overwrite": overwrite}
    try:
        return workers.run(
            "qtool.convert.checkpoint", job, python=interpreter("native"), on_event=on_event, env=native.environment()
        )
    finally:
        tidy(output)  # what a killed worker could not remove
