"""One quantization: the engine's job, made of a model, a recipe and what overrides it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtool import engines, workers
from qtool.checkpoint.storage import tidy
from qtool.engines.job import Job
from qtool.errors import InputError
from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class Resources:
    """What the native engine may use.

    Attributes:
        memory: bytes of a process, or None for whatever it takes.
        workers: processes that quantize, besides the one that runs the layers; 0 does all in that one.
        ray: address of a Ray cluster whose workers quantize instead, or None.
        threads: of each process; None takes the cores there are. The result depends on it in the last bits.
    """

    memory: int | None = None
    workers: int = 0
    ray: str | None = None
    threads: int | None = None


OnEvent = Callable[[workers.Event], None]


def scheme_of(recipe: Recipe, wanted: str | None) -> str:
    """The name of a scheme that the recipe has: `wanted`, or its own default. Raises InputError."""
    scheme = wanted or recipe.default_scheme
    if scheme not in recipe.schemes:
        hint = f"it has {', '.join(recipe.schemes)}"
        raise InputError(f"no scheme {scheme!r} in this recipe", where=f"recipe {recipe.name}", hint=hint)
    return scheme


def run(
    model: Path,
    output: Path,
    recipe: Recipe,
    *,
    scheme: str,
    engine: str,
    calibration: dict[str, Any],
    format: str | None = None,
    device: str = "auto",
    devices: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    restart: bool = False,
    resources: Resources | None = None,
    on_event: OnEvent,
) -> dict[str, Any]:
    """Quantize the folder `model` into `output`; the engine's report, or for a dry run its plan.

    Args:
        model, output: absolute paths.
        calibration: data (builtin, self or a file), samples, seq_len and seed.
        resume: go on where an earlier run of the same job ended.
        restart: with `resume`, start over where it was another job, rather than refuse.
        resources: what the native engine may use.

    Raises:
        InputError, QtoolError: as the engine does.
    """
    if calibration["data"] == "self" and not dry_run:
        calibration = _own_samples(model, calibration, trust_remote_code, on_event)
    elif calibration["data"] not in ("builtin", "self"):
        calibration = {**calibration, "data": str(Path(calibration["data"]).expanduser().absolute())}
    job = asdict(
        Job(
            model=str(model),
            output=str(output),
            format=format or recipe.export.format,
            recipe=recipe.model_dump(mode="json"),
            scheme=scheme,
            calibration=calibration,
            device=device,
            devices=devices,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            dry_run=dry_run,
            resume=resume,
            restart=restart,
            **asdict(resources or Resources()),
        )
    )
    if dry_run:
        return engines.run(engine, job, on_event)
    try:
        return engines.run(engine, job, on_event)
    finally:
        left = tidy(output, keep_resumable=True)  # what a killed worker could not remove
        if left is not None:
            on_event({"event": "warning", "message": f"what is finished is kept in {left}; --resume goes on there"})


def _own_samples(model: Path, wanted: dict[str, Any], trust_remote_code: bool, on_event: OnEvent) -> dict[str, Any]:
    """Calibration on what the model writes by itself, at temperature 1."""
    from qtool.runtimes import sample

    ids = sample(
        model,
        wanted["samples"],
        wanted["seq_len"],
        wanted["seed"],
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
    digest = hashlib.sha256()
    for row in ids:
        for token in row:
            digest.update(token.to_bytes(8, "little", signed=True))
    return {**wanted, "ids": ids, "digest": digest.hexdigest(), "source": "self (the model's own samples)"}
