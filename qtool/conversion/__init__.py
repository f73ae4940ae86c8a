"""Between checkpoint formats, from GGUF files and to them. The work is done in workers; nothing heavy is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.checkpoint import formats
from qtool.checkpoint.storage import PartialFolder, check_output, tidy
from qtool.conversion.job import SCHEMES, FormatJob, GgufJob
from qtool.engines import native
from qtool.environments.lookup import interpreter
from qtool.errors import InputError
from qtool.files import check_new_file, disk_errors

_FLOAT8 = "compressed-tensors"  # the format that has it

OnEvent = Callable[[workers.Event], None]


def beside(source: Path, to: str | None) -> Path:
    """The folder that `source` becomes where nobody names one; `to` is a format or scheme, None for a GGUF file's."""
    return source.with_name(source.stem if to is None else f"{source.name}-{to}")


def for_scheme(to: str | None, scheme: str) -> tuple[str, str]:
    """The format and the scheme, by their own names, of a conversion that rounds to another scheme.

    Args:
        to: a format; None or safetensors for the one that has such schemes.
        scheme: in any case.

    Raises:
        InputError: a scheme that isn't made so, or something that holds no scheme.
    """
    if scheme.lower() not in SCHEMES:
        hint = "Other schemes need calibration: quantize the original model with qtool quantize."
        raise InputError(f"{scheme!r} is none of {', '.join(SCHEMES)}", where="--scheme", hint=hint)
    if to not in (None, "safetensors", *formats.NAMES):
        raise InputError(f"{to} has no {scheme.lower()}", where="--scheme", hint=f"Leave out --to, or say {_FLOAT8}.")
    return to if to in formats.NAMES else _FLOAT8, scheme.lower()


def from_gguf(source: Path, output: Path, dtype: str, *, overwrite: bool, on_event: OnEvent) -> dict[str, Any]:
    """Make `output` a Hugging Face checkpoint of a GGUF file, its parameters in `dtype`; see `convert.gguf.main`.

    Raises:
        InputError, QtoolError: as the worker does, or the output is there already and `overwrite` is off.
    """
    output = output.absolute()
    tidy(output)
    check_output(output, overwrite=overwrite, source=source)
    python = interpreter("native")
    partial = PartialFolder.make(output)
    try:
        job = GgufJob(str(source.absolute()), str(partial.path), str(output), dtype)
        result = workers.run("qtool.conversion.gguf", dataclasses.asdict(job), python=python, on_event=on_event)
        with disk_errors(output, result["nbytes"]):
            partial.commit(overwrite=overwrite)
    finally:
        partial.discard()
    return {"output": str(output), "dtype": dtype, **result}


def to_format(
    source: Path, output: Path, to: str, *, overwrite: bool, on_event: OnEvent, scheme: str | None = None
) -> dict[str, Any]:
    """Make `output` the quantized checkpoint `source` in another format or scheme; see `conversion.checkpoint.main`.

    Raises:
        InputError, QtoolError: as the worker does, or the output is there already and `overwrite` is off.
    """
    output = output.absolute()
    tidy(output)
    check_output(output, overwrite=overwrite, source=source)
    job = dataclasses.asdict(FormatJob(str(source.absolute()), str(output), to, overwrite, scheme))
    python, env = interpreter("native"), native.environment()
    try:
        return workers.run("qtool.conversion.checkpoint", job, python=python, on_event=on_event, env=env)
    finally:
        tidy(output)  # what a killed worker could not remove


def to_gguf(source: Path, output: Path, *, overwrite: bool, on_event: OnEvent) -> dict[str, Any]:
    """Make `output` a GGUF file of the checkpoint `source`; see `conversion.gguf_output.main`.

    Raises:
        InputError, QtoolError: as the worker does, or the output is there already and `overwrite` is off.
    """
    output = output.absolute()
    check_new_file(output, "--output", overwrite=overwrite)
    job = dataclasses.asdict(FormatJob(str(source.absolute()), str(output), "gguf", overwrite))
    return workers.run("qtool.conversion.gguf_output", job, python=interpreter("llama-cpp"), on_event=on_event)
