"""The Golden Stick engine, seen from the command line: what runs where, in which order.

Three processes one after the other, since no interpreter has both torch and mindspore-gs: the tokenizer makes ids,
mindspore-gs quantizes, and torch writes the checkpoint. Between them lies a hidden folder beside the output, which is
gone afterwards, however it ends. Nothing heavy is imported here.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qtool import workers
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.formats import nibbles
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.storage import PartialFolder
from qtool.engines import native, plan
from qtool.engines.golden_stick import config, mindformers, mindone, view
from qtool.engines.golden_stick.tasks import Calibrated, CalibrateTask, CardsLaunch, Exported, ExportTask
from qtool.engines.job import CalibrationTokens, QuantizationJob
from qtool.engines.plan import QuantizationPlan
from qtool.engines.report import (
    CalibrationUsed,
    DryRun,
    LaunchOfCards,
    QuantizationReport,
    QuantizationResult,
    QuantizedGroup,
)
from qtool.environments.lookup import interpreter
from qtool.errors import InputError
from qtool.files import check_free_space
from qtool.scheme import W8A8, W8A8_DYNAMIC, name_of
from qtool.workers import processes

_LINEAR = re.compile(r"((?:.*\.)?(?:layers|h)\.(\d+)\..+)\.weight")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
OnEvent = Callable[[workers.Event], None]


def quantize(job: QuantizationJob, on_event: OnEvent) -> QuantizationResult:
    """Quantize a checkpoint with mindspore-gs.

    Raises:
        InputError: a model that mindspore-gs doesn't know, an interpreter that is missing, a bad recipe or text.
        QtoolError: a worker failed, or the disk is full.
    """
    return _execute(_prepare(job, on_event), on_event)


def dry_run(job: QuantizationJob, on_event: OnEvent) -> DryRun:
    """What `quantize` would do. Raises InputError as that does."""
    prepared = _prepare(job, on_event)
    launch = None
    if not prepared.through_mindone:
        partial = job.output.path.with_name(f".{job.output.path.name}.partial")
        cards = _cards(prepared, job.calibration.seq_len, partial / "scratch")
        launch = LaunchOfCards(cards.yaml, " ".join(cards.msrun))
    return DryRun(
        layers=plan.summary(prepared.plan),
        calibration=job.calibration.shown(),
        input_bytes=prepared.checkpoint.nbytes,
        output_bytes=prepared.output_bytes,
        launch=launch,
    )


_INT4 = ", whose int4 is more exact: mindspore-gs 1.4.1 gives groups of channels the scales of others"
_NO_CACHE = (
    "mindspore-gs quantizes keys and values in MindFormers' older models alone, which vLLM-MindSpore doesn't run"
)


def beyond(job: QuantizationJob) -> str | None:
    """Why Golden Stick can't do a job, in words; None where it can, as far as config.json and the recipe tell.

    Raises InputError for a damaged checkpoint.
    """
    checkpoint = Checkpoint.open(job.model)
    for policy in job.recipe.schemes[job.scheme]:
        if policy.quantize and policy.scheme not in (W8A8, W8A8_DYNAMIC):
            return f"mindspore-gs quantizes to W8A8, not {policy.scheme.label}"
    if job.recipe.cache is not None:
        return _NO_CACHE
    try:
        _through_mindone(checkpoint, job.devices or job.recipe.launch.devices, job.output.format)
    except InputError as error:
        return error.what
    return None


def _refuse_accelerate(python: str) -> None:
    """Raises InputError where accelerate is beside mindspore-gs: calibrating fails then (vLLM-MindSpore's documentation
    of 2026, "Quantization Methods")."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('accelerate') is not None)"
    command, env = processes.python(python, "-c", code)
    if subprocess.run(command, env={**os.environ, **env}, stdin=subprocess.DEVNULL).returncode == 1:
        raise InputError(
            "accelerate is installed beside mindspore-gs, which fails while calibrating then",
            where=python,
            hint=f"Remove it, {python} -m pip uninstall accelerate, or take --engine native.",
        )


@dataclass(frozen=True)
class _Prepared:
    """A job that can be done.

    Attributes:
        job: as asked for.
        checkpoint: the float model.
        plan: what becomes of which linear.
        devices: cards.
        through_mindone: MindOne runs the model; else MindFormers does.
        output_bytes: of the output's tensors.
    """

    job: QuantizationJob
    checkpoint: Checkpoint
    plan: QuantizationPlan
    devices: int
    through_mindone: bool
    output_bytes: int


def _prepare(job: QuantizationJob, on_event: OnEvent) -> _Prepared:
    checkpoint = Checkpoint.open(job.model)
    plan.refuse_quantized(checkpoint)
    planned = plan.make(checkpoint, job.recipe, job.scheme, job.output.format, _linears(checkpoint), symmetric=True)
    _refuse_schemes(planned, f"recipe {job.recipe.name}, scheme {job.scheme}")
    if job.recipe.cache is not None:
        hint = "Take --engine native, or leave out --kv-cache."
        raise InputError(_NO_CACHE, where=f"recipe {job.recipe.name}, kv_cache: {job.recipe.kv_cache}", hint=hint)
    devices = job.devices or job.recipe.launch.devices
    through_mindone = _through_mindone(checkpoint, devices, job.output.format)
    policies = job.recipe.schemes[job.scheme]
    config.patterns([policy.layers for policy in policies])
    if job.recipe.effort == "high":
        on_event({"event": "warning", "message": "Golden Stick knows one effort; `effort: high` has no effect"})
    for warning in (*planned.warnings, *config.differences(policies)):
        on_event({"event": "warning", "message": warning})
    size = plan.output_bytes(FloatReader(checkpoint), planned.schemes)
    return _Prepared(job, checkpoint, planned, devices, through_mindone, size)


def _refuse_schemes(planned: QuantizationPlan, where: str) -> None:
    """Raises InputError for what the engine doesn't ask of mindspore-gs."""
    for name, scheme in planned.schemes.items():
        if scheme not in (None, W8A8, W8A8_DYNAMIC):
            assert scheme is not None
            what = f"the golden-stick engine quantizes to W8A8, and {name} would be {scheme.label}"
            raise InputError(what, where=where, hint="use --engine native" + (_INT4 if nibbles.has(scheme) else ""))


def _execute(prepared: _Prepared, on_event: OnEvent) -> QuantizationResult:
    job = prepared.job
    python, torch_python = interpreter("golden-stick"), interpreter("native")
    _refuse_accelerate(python)
    check_free_space(job.output.path, 2 * prepared.output_bytes + _float_bytes(prepared))
    text = _text(job, torch_python, on_event)
    with _between(job.output.path) as folder:
        task = _task(prepared, text, folder)
        if task.launch is None:
            module, env = "qtool.engines.golden_stick.worker", _environment()
        else:
            module, env = "qtool.engines.golden_stick.launch", mindformers.environment() | _environment()
        answer = workers.run(module, asdict(task), python=python, on_event=on_event, env=env)
        report = _report(prepared, text, Calibrated(**answer))
        export = ExportTask(
            source=str(job.model),
            quantized=task.output,
            output=str(job.output.path),
            format=job.output.format,
            overwrite=job.output.overwrite,
            max_shard_gb=job.recipe.export.max_shard_gb,
            schemes=_schemes(prepared.plan) if prepared.through_mindone else None,
            report=report.to_json(),
        )
        module = "qtool.engines.golden_stick.export"
        answer = workers.run(module, asdict(export), python=torch_python, on_event=on_event)
    written = Exported(**answer)
    assert report.seconds is not None
    assert report.peak_memory_bytes is not None
    return QuantizationResult(
        report=report,
        output=Path(written.output),
        input_bytes=written.input_bytes,
        output_bytes=written.output_bytes,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
    )


def _task(prepared: _Prepared, text: CalibrationTokens, folder: Path) -> CalibrateTask:
    """What mindspore-gs has to do, with its own folders inside `folder`."""
    job, scratch = prepared.job, folder / "scratch"
    scratch.mkdir()
    mindone_model = str(view.make(prepared.checkpoint, folder / "model")) if prepared.through_mindone else ""
    return CalibrateTask(
        policies=[config.layer_policy(policy) for policy in job.recipe.schemes[job.scheme]],
        ids=text.ids,
        seed=job.calibration.seed,
        output=str(folder / "quantized"),
        scratch=str(scratch),
        model=mindone_model,
        device=job.device,
        launch=None if prepared.through_mindone else _cards(prepared, len(text.ids[0]), scratch),
    )


def _through_mindone(checkpoint: Checkpoint, devices: int, format_name: str) -> bool:
    """Whether MindOne runs this model; else MindFormers does.

    Raises:
        InputError: neither knows it, or MindFormers can't do what is asked for.
    """
    kind = checkpoint.config.get("model_type")
    if kind in mindone.MODEL_TYPES and devices == 1:
        return True
    if kind not in mindformers.MODEL_TYPES:
        known = ", ".join(dict.fromkeys((*mindone.MODEL_TYPES, *mindformers.MODEL_TYPES)))
        raise InputError(
            f"mindspore-gs can't quantize model_type {kind!r}" + (f" on {devices} cards" if devices > 1 else ""),
            where=str(checkpoint.path),
            hint=f"It takes {known}; on several cards {', '.join(mindformers.MODEL_TYPES)}. Others: --engine native.",
        )
    if format_name != "golden-stick":
        raise InputError(
            f"what mindspore-gs makes through MindFormers can't be written as {format_name}: "
            "it keeps the smoothing in the input scales, channel by channel",
            where="--format",
            hint="use --format golden-stick",
        )
    return False


def _cards(prepared: _Prepared, seq_len: int, scratch: Path) -> CardsLaunch:
    settings = mindformers.settings(
        prepared.checkpoint,
        devices=prepared.devices,
        folder=scratch / "output",
        seed=prepared.job.calibration.seed,
        seq_len=seq_len,
    )
    program = str(Path(__file__).with_name("rank.py"))
    msrun = mindformers.command(prepared.devices, scratch / "cards", program, str(scratch / "job.json"))
    return CardsLaunch(yaml=mindformers.as_yaml(settings), msrun=msrun)


def _linears(checkpoint: Checkpoint) -> list[str]:
    """Every matrix inside the decoder layers, from the headers alone; in the order in which a layer uses them."""
    found = []
    for name in checkpoint.names:
        match = _LINEAR.fullmatch(name)
        if match and len(checkpoint.info(name).shape) == 2:
            last = match[1].rpartition(".")[2]
            found.append((int(match[2]), _ORDER.index(last) if last in _ORDER else len(_ORDER), match[1]))
    return [name for _, _, name in sorted(found)]


def _float_bytes(prepared: _Prepared) -> int:
    """Of the tensors that stay float."""
    checkpoint = prepared.checkpoint
    quantized = {f"{name}.weight" for name, policy in prepared.plan.policies.items() if policy}
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names if name not in quantized)


def _text(job: QuantizationJob, python: str, on_event: OnEvent) -> CalibrationTokens:
    wanted = job.calibration
    if wanted.tokens is not None:
        return wanted.tokens
    task = {
        "model": str(job.model),
        "trust_remote_code": job.trust_remote_code,
        "data": wanted.data,
        "samples": wanted.samples,
        "seq_len": wanted.seq_len,
        "seed": wanted.seed,
    }
    return CalibrationTokens(**workers.run("qtool.calibration.worker", task, python=python, on_event=on_event))


@contextmanager
def _between(output: Path) -> Iterator[Path]:
    """A folder for what one process leaves to the next."""
    partial = PartialFolder.make(output)
    try:
        yield partial.path
    finally:
        partial.discard()


def _schemes(planned: QuantizationPlan) -> dict[str, str | None]:
    return {name: None if scheme is None else name_of(scheme) for name, scheme in planned.schemes.items()}


def _environment() -> dict[str, str]:
    """MindSpore's own log at errors only, and memory as the native engine has it; what the user has set stays."""
    return native.environment() | ({} if "GLOG_v" in os.environ else {"GLOG_v": "3"})


def _report(prepared: _Prepared, text: CalibrationTokens, made: Calibrated) -> QuantizationReport:
    job, checkpoint = prepared.job, prepared.checkpoint
    return QuantizationReport(
        versions=made.versions,
        engine="golden-stick",
        device=made.device,
        source=checkpoint.path.name,
        origin=checkpoint.origin,
        format=job.output.format,
        recipe=job.recipe.model_dump(mode="json"),
        scheme=job.scheme,
        calibration=CalibrationUsed(
            source=text.source, sha256=text.digest, samples=len(text.ids), seq_len=len(text.ids[0])
        ),
        seconds=made.seconds,
        peak_memory_bytes=made.peak_memory_bytes,
        layers=_groups(prepared.plan, made.alphas),
    )


def _groups(planned: QuantizationPlan, alphas: dict[str, float]) -> list[QuantizedGroup]:
    """Linears that share their input, in the order of the plan; the alpha of one is that of all."""
    together: dict[tuple[str, str], list[str]] = {}
    for name, policy in planned.policies.items():
        if policy is None:
            continue
        match = re.fullmatch(r"((?:.*\.)?(?:layers|h)\.\d+)\.(.+)", name)
        assert match is not None
        layer, linear = match.groups()
        owner, _, last = linear.rpartition(".")
        together.setdefault((layer, f"{owner}.{_TOGETHER.get(last, last)}"), []).append(linear)
    groups = []
    for (layer, _), linears in together.items():
        policy = planned.policies[f"{layer}.{linears[0]}"]
        assert policy is not None
        found = [alphas[name] for linear in linears if (name := f"{layer}.{linear}") in alphas]
        groups.append(
            QuantizedGroup(
                layer=layer,
                linears=linears,
                activations=policy.activations.mode,
                smoothing=policy.smoothing.method,
                alpha=found[-1] if found else None,
            )
        )
    return groups
