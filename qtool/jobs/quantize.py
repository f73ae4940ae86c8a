"""One quantization: an engine does it, and what it needs or leaves besides is seen to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qtool import engines, workers
from qtool.calibration import sources
from qtool.checkpoint import formats
from qtool.checkpoint.companions import companions
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.storage import check_output, tidy
from qtool.engines.job import CalibrationText, CalibrationTokens, OutputFolder, QuantizationJob, Resources
from qtool.engines.report import DryRun, QuantizationResult
from qtool.environments import machine
from qtool.errors import InputError
from qtool.files import expand
from qtool.recipe.load import load, match
from qtool.recipe.schema import Match, Recipe
from qtool.scheme import PRESETS

OnEvent = Callable[[workers.Event], None]

_ASKED = "as asked for"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A quantization as somebody asks for it; None leaves the choice to the recipe, or to qtool.

    Attributes:
        output: the folder to make; None for BESIDE-SCHEME.
        beside: what its name begins with then; None for the model's folder.
        recipe: a recipe's name or file; None for the one that matches the model.
        scheme: one of the recipe's.
        format: of the checkpoint.
        kv_cache: how keys and values are kept: fp8, int8 or float.
        engine: auto, native or golden-stick.
        effort: normal or high.
        calibration: builtin, self, or a file of text.
        samples, seq_len, seed: of the calibration.
        device: auto, cpu, cuda or npu.
        devices: cards of this machine to use.
        overwrite: replace the output if it exists.
        resume: go on where an earlier run of the same job ended.
    """

    output: Path | None = None
    beside: Path | None = None
    recipe: str | None = None
    scheme: str | None = None
    format: str | None = None
    kv_cache: Literal["fp8", "int8", "float"] | None = None
    engine: str = "auto"
    effort: Literal["normal", "high"] | None = None
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    device: str = "auto"
    devices: int | None = None
    overwrite: bool = False
    resume: bool = False
    trust_remote_code: bool = False
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class Decided:
    """What will be done, and why so.

    Attributes:
        engine: native or golden-stick.
        job: for the engine.
        why: the choices in one line.
        advice: what may suit this machine better, if anything.
    """

    engine: str
    job: QuantizationJob
    why: str
    advice: str | None = None


def decide(model: Path, wanted: Wanted) -> Decided:
    """Make every choice that `wanted` leaves open, from the model's config.json, its recipe and this machine.

    Raises:
        InputError: no such model, recipe or scheme.
    """
    folder = expand(model).absolute()
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_claims()
    companions(checkpoint)  # what can't be carried over is better said now than at the end
    config = checkpoint.config
    recipe, reason = match(config) if wanted.recipe is None else (load(wanted.recipe), _ASKED)
    recipe, scheme = with_scheme(recipe, wanted.scheme)
    if wanted.effort is not None:
        recipe = recipe.model_copy(update={"effort": wanted.effort})
    if wanted.kv_cache is not None:
        kept = None if wanted.kv_cache == "float" else wanted.kv_cache
        recipe = recipe.model_copy(update={"kv_cache": kept})
    beside = wanted.beside or folder
    output = expand(wanted.output or beside.with_name(f"{beside.name}-{scheme}")).absolute()
    job = QuantizationJob(
        model=folder,
        output=OutputFolder(
            output, wanted.format or recipe.export.format, overwrite=wanted.overwrite, resume=wanted.resume
        ),
        recipe=recipe,
        scheme=scheme,
        calibration=CalibrationText(
            data=wanted.calibration or recipe.calibration.data,
            samples=wanted.samples or recipe.calibration.samples,
            seq_len=wanted.seq_len or recipe.calibration.seq_len,
            seed=recipe.calibration.seed if wanted.seed is None else wanted.seed,
        ),
        device=wanted.device,
        devices=wanted.devices,
        trust_remote_code=wanted.trust_remote_code,
        resources=wanted.resources,
    )
    engine, why = engines.choose(job) if wanted.engine == "auto" else (wanted.engine, _ASKED)
    said = f"recipe {recipe.name} ({reason}), scheme {scheme}, engine {engine} ({why})"
    nobody_chose = wanted.recipe is None and wanted.scheme is None and recipe.match == Match()
    # Golden Stick measures nothing of the kind.
    if nobody_chose and engine == "native" and formats.get(job.output.format).mixes(config):
        measured = recipe.measured(scheme)
        if measured != recipe:
            job = replace(job, recipe=measured)
            said += "; activations are static only where calibration finds that this costs little"
    return Decided(engine, job, said, advice(job, blackwell=machine.is_blackwell()))


def advice(job: QuantizationJob, *, blackwell: bool) -> str | None:
    """What to try where vLLM by itself has no kernel for what a job makes; None where there is nothing to say.

    Args:
        blackwell: a GPU of this machine is one of NVIDIA's Blackwell generation.
    """
    inputs = [policy.scheme.activations for policy in job.recipe.schemes[job.scheme] if policy.quantize]
    integers = any(each is not None and each.type == "int" for each in inputs)
    if not (blackwell and integers and job.output.format == "compressed-tensors"):
        return None
    return (
        "vLLM 0.32 by itself has no int8 kernel for the Blackwell GPU here, where qtool has it take Triton's: "
        "--scheme fp8-dynamic, or fp8-block, runs on vLLM's own"
    )


def with_scheme(recipe: Recipe, wanted: str | None) -> tuple[Recipe, str]:
    """A recipe that has a scheme, and its name: `wanted`, or the recipe's own default.

    Raises InputError for one that is neither the recipe's nor a usual precision (w4a16, say).
    """
    scheme = wanted or recipe.default_scheme
    found = recipe.with_scheme(scheme)
    if found is None:
        usual = [name.lower() for name in PRESETS if name.lower() not in recipe.schemes]
        hint = f"it has {', '.join(recipe.schemes)}; {', '.join(usual)} go with every recipe"
        raise InputError(f"no scheme {scheme!r} in this recipe", where=f"recipe {recipe.name}", hint=hint)
    return found, scheme


def run(engine: str, job: QuantizationJob, on_event: OnEvent) -> QuantizationResult:
    """Quantize.

    Args:
        engine: native or golden-stick.
        job: its paths are absolute, or relative to the current folder.

    Raises:
        InputError: an output that must not be written. InputError, QtoolError: as the engine does.
    """
    job = _absolute(job)
    check(job)
    if job.calibration.data == "self":
        job = _with_own_samples(job, on_event)
    try:
        return engines.quantize(engine, job, on_event)
    finally:
        left = tidy(job.output.path, keep_resumable=True)  # what a killed worker could not remove
        if left is not None:
            on_event({"event": "warning", "message": f"the finished work is kept in {left}; add --resume to continue"})


def check(job: QuantizationJob) -> None:
    """Refuse what could only fail. Raises InputError: an output that must not be written, a text that can't be read."""
    check_output(job.output.path, overwrite=job.output.overwrite, source=job.model)
    sources.check(job.calibration.data)


def dry_run(engine: str, job: QuantizationJob, on_event: OnEvent) -> DryRun:
    """What `run` would do. Raises InputError and QtoolError where `run` would, as far as that can be known."""
    job = _absolute(job)
    check(job)
    return engines.dry_run(engine, job, on_event)


def _absolute(job: QuantizationJob) -> QuantizationJob:
    """The same job from any current folder."""
    calibration = replace(job.calibration, data=sources.absolute(job.calibration.data))
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
