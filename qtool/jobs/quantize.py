"""One quantization: an engine does it, and what it needs or leaves besides is seen to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qtool import engines, workers
from qtool.checkpoint.storage import tidy
from qtool.engines.job import CalibrationTokens, QuantizationJob
from qtool.engines.report import DryRun, QuantizationResult
from qtool.errors import InputError
from qtool.recipe.schema import Recipe

OnEvent = Callable[[workers.Event], None]


def scheme_of(recipe: Recipe, wanted: str | None) -> str:
    """The name of a scheme that the recipe has: `wanted`, or its own default. Raises InputError."""
    scheme = wanted or recipe.default_scheme
    if scheme not in recipe.schemes:
        hint = f"it has {', '.join(recipe.schemes)}"
        raise InputError(f"no scheme {scheme!r} in this recipe", where=f"recipe {recipe.name}", hint=hint)
    return scheme


def run(engine: str, job: QuantizationJob, on_event: OnEvent) -> QuantizationResult:
    """Quantize.

    Args:
        engine: native or golden-stick.
        job: its paths are absolute, or relative to the current folder.

    Raises:
        InputError, QtoolError: as the engine does.
    """
    job = _absolute(job)
    if job.calibration.data == "self":
        job = _with_own_samples(job, on_event)
    try:
        return engines.quantize(engine, job, on_event)
    finally:
        left = tidy(job.output.path, keep_resumable=True)  # what a killed worker could not remove
        if left is not None:
            on_event({"event": "warning", "message": f"what is finished is kept in {left}; --resume goes on there"})


def dry_run(engine: str, job: QuantizationJob, on_event: OnEvent) -> DryRun:
    """What `run` would do. Raises InputError and QtoolError as the engine does."""
    return engines.dry_run(engine, _absolute(job), on_event)


def _absolute(job: QuantizationJob) -> QuantizationJob:
    """The same job from any current folder."""
    calibration = job.calibration
    if calibration.data not in ("builtin", "self"):
        calibration = replace(calibration, data=str(Path(calibration.data).expanduser().absolute()))
    output = replace(job.output, path=job.output.path.absolute())
    return replace(job, model=job.model.absolute(), output=output, calibration=calibration)


def _with_own_samples(job: QuantizationJob, on_event: OnEvent) -> QuantizationJob:
    """Calibrated on what the model writes by itself, at temperature 1."""
    from qtool.runtimes import sample

    wanted = job.calibration
    ids = sample(
        job.model,
        wanted.samples,
        wanted.seq_len,
        wanted.seed,
        trust_remote_code=job.trust_remote_code,
        on_event=on_event,
    )
    digest = hashlib.sha256()
    for row in ids:
        for token in row:
            digest.update(token.to_bytes(8, "little", signed=True))
    tokens = CalibrationTokens(ids, digest.hexdigest(), "self (the model's own samples)")
    return replace(job, calibration=replace(wanted, tokens=tokens))
