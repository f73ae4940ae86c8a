"""The Golden Stick engine, seen from the command line: what runs where, in which order.

Three processes one after the other, since no interpreter has both torch and mindspore-gs: the tokenizer makes ids,
mindspore-gs quantizes, and torch writes the checkpoint. Between them lies a hidden folder beside the output, which is
gone afterwards, however it ends. Nothing heavy is imported here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qtool
from qtool import workers
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.storage import PartialFolder
from qtool.engines import native
from qtool.engines.golden_stick import config, mindformers, mindone, view
from qtool.engines.native import plan
from qtool.environments.lookup import interpreter
from qtool.errors import InputError
from qtool.files import check_free_space
from qtool.recipe.schema import Recipe
from qtool.scheme import name_of

_LINEAR = re.compile(r"((?:.*\.)?(?:layers|h)\.(\d+)\..+)\.weight")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OnEvent = Callable[[workers.Event], None]


def quantize(job: dict[str, Any], on_event: OnEvent) -> dict[str, Any]:
    """Quantize a checkpoint with mindspore-gs.

    Takes the same job as the native engine, and `devices` (cards; None: the recipe's). Returns the same report, whose
    layers have no error; for a dry run of MindFormers the plan has its `yaml` and the `msrun` line too.

    Raises:
        InputError: a model that mindspore-gs doesn't know, an interpreter that is missing, a bad recipe or text.
        QtoolError: a worker failed, or the disk is full.
    """
    recipe = Recipe.model_validate(job["recipe"])
    policies = [policy.model_dump(mode="json") for policy in recipe.schemes[job["scheme"]]]
    checkpoint = Checkpoint.open(job["model"])
    planned = plan.make(checkpoint, recipe, job["scheme"], job["format"], _linears(checkpoint))
    devices = job["devices"] or recipe.launch.devices
    through_mindone = _through_mindone(checkpoint, devices, job["format"])
    config.patterns(policies)
    for warning in (*planned.warnings, *config.differences(policies)):
        on_event({"event": "warning", "message": warning})
    size = plan.output_bytes(FloatReader(checkpoint), planned.schemes)
    if job["dry_run"]:
        return _dry_run(job, checkpoint, planned, size, None if through_mindone else devices)
    python, torch_python = interpreter("golden-stick"), interpreter("native")
    output = Path(job["output"])
    check_free_space(output, 2 * size + _float_bytes(checkpoint, planned))
    text = _text(job, torch_python, on_event)
    with _between(output) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        task = {
            "policies": policies,
            "ids": text["ids"],
            "output": str(folder / "quantized"),
            "scratch": str(scratch),
            "seed": job["calibration"]["seed"],
        }
        env = _environment()
        if through_mindone:
            module = "qtool.engines.golden_stick.worker"
            task |= {"model": str(view.make(checkpoint, folder / "model")), "device": job["device"]}
        else:
            module = "qtool.engines.golden_stick.launch"
            task |= _msrun(job, checkpoint, devices, len(text["ids"][0]), scratch)
            env = mindformers.environment() | env
        made = workers.run(module, task, python=python, on_event=on_event, env=env)
        report = {
            "qtool": qtool.__version__,
            "versions": made["versions"],
            "engine": "golden-stick",
            "device": made["device"],
            "source": checkpoint.path.name,
            "origin": checkpoint.origin,
            "format": job["format"],
            "recipe": job["recipe"],
            "scheme": job["scheme"],
            "calibration": {
                "source": text["source"],
                "sha256": text["digest"],
                "samples": len(text["ids"]),
                "seq_len": len(text["ids"][0]),
            },
            "seconds": made["seconds"],
            "peak_memory_bytes": made["peak_memory_bytes"],
            "layers": _groups(planned, made["alphas"]),
        }
        written = workers.run(
            "qtool.engines.golden_stick.export",
            {
                "source": job["model"],
                "quantized": str(folder / "quantized"),
                "output": job["output"],
                "format": job["format"],
                "overwrite": job["overwrite"],
                "max_shard_gb": recipe.export.max_shard_gb,
                "schemes": {name: how and name_of(how) for name, how in planned.schemes.items()}
                if through_mindone
                else None,
                "report": report,
            },
            python=torch_python,
            on_event=on_event,
        )
    return {**report, **written}


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


def _msrun(job: dict[str, Any], checkpoint: Checkpoint, devices: int, seq_len: int, scratch: Path) -> dict[str, Any]:
    settings = mindformers.settings(
        checkpoint, devices=devices, folder=scratch / "output", seed=job["calibration"]["seed"], seq_len=seq_len
    )
    program = str(Path(__file__).with_name("rank.py"))
    return {
        "yaml": mindformers.as_yaml(settings),
        "msrun": mindformers.command(devices, scratch / "cards", program, str(scratch / "job.json")),
    }


def _dry_run(
    job: dict[str, Any], checkpoint: Checkpoint, planned: plan.Plan, size: int, devices: int | None
) -> dict[str, Any]:
    result = {
        "layers": plan.summary(planned),
        "calibration": {key: job["calibration"][key] for key in ("data", "samples", "seq_len")},
        "input_bytes": checkpoint.nbytes,
        "output_bytes": size,
    }
    if devices is not None:
        scratch = Path(job["output"]).with_name(f".{Path(job['output']).name}.partial") / "scratch"
        launch = _msrun(job, checkpoint, devices, job["calibration"]["seq_len"], scratch)
        result |= {"yaml": launch["yaml"], "msrun": " ".join(launch["msrun"])}
    return result


def _linears(checkpoint: Checkpoint) -> list[str]:
    """Every matrix inside the decoder layers, from the headers alone; in the order in which a layer uses them."""
    found = []
    for name in checkpoint.names:
        match = _LINEAR.fullmatch(name)
        if match and len(checkpoint.info(name).shape) == 2:
            last = match[1].rpartition(".")[2]
            found.append((int(match[2]), _ORDER.index(last) if last in _ORDER else len(_ORDER), match[1]))
    return [name for _, _, name in sorted(found)]


def _float_bytes(checkpoint: Checkpoint, planned: plan.Plan) -> int:
    """Of the tensors that stay float."""
    quantized = {f"{name}.weight" for name, policy in planned.policies.items() if policy}
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names if name not in quantized)


def _text(job: dict[str, Any], python: str, on_event: OnEvent) -> dict[str, Any]:
    wanted = job["calibration"]
    if "ids" in wanted:
        return wanted
    task = {"model": job["model"], "trust_remote_code": job["trust_remote_code"], **wanted}
    return workers.run("qtool.calibration.worker", task, python=python, on_event=on_event)


@contextmanager
def _between(output: Path) -> Iterator[Path]:
    """A folder for what one process leaves to the next."""
    partial = PartialFolder(output)
    try:
        yield partial.path
    finally:
        partial.discard()


def _environment() -> dict[str, str]:
    """MindSpore's own log at errors only, and memory as the native engine has it; what the user has set stays."""
    return native.environment() | ({} if "GLOG_v" in os.environ else {"GLOG_v": "3"})


def _groups(planned: plan.Plan, alphas: dict[str, float]) -> list[dict[str, Any]]:
    """The report's rows: linears that share their input, in the order of the plan."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, policy in planned.policies.items():
        if policy is None:
            continue
        match = re.fullmatch(r"((?:.*\.)?(?:layers|h)\.\d+)\.(.+)", name)
        assert match is not None
        layer, linear = match.groups()
        owner, _, last = linear.rpartition(".")
        kind = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        row = rows.setdefault(
            (layer, f"{owner}.{kind.get(last, last)}"),
            {
                "layer": layer,
                "linears": [],
                "activations": policy.activations.mode,
                "smoothing": policy.smoothing.method,
                "alpha": None,
            },
        )
        row["linears"].append(linear)
        row["alpha"] = alphas.get(name, row["alpha"])
    return list(rows.values())
