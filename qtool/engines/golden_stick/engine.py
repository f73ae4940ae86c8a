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
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.storage import PartialFolder, check_free_space
from qtool.engines import native
from qtool.engines.golden_stick import config, mindone, view
from qtool.engines.native import plan
from qtool.errors import InputError
from qtool.recipe.schema import Recipe

_LINEAR = re.compile(r"((?:.*\.)?layers\.(\d+)\..+)\.weight")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OnEvent = Callable[[workers.Event], None]


def quantize(job: dict[str, Any], on_event: OnEvent) -> dict[str, Any]:
    """Quantize a checkpoint with mindspore-gs.

    Takes the same job as the native engine and returns the same report; layers of the report have no error.

    Raises:
        InputError: a model that mindspore-gs doesn't know, an interpreter that is missing, a bad recipe or text.
        QtoolError: a worker failed, or the disk is full.
    """
    recipe = Recipe.model_validate(job["recipe"])
    policies = [policy.model_dump(mode="json") for policy in recipe.schemes[job["scheme"]]]
    checkpoint = Checkpoint.open(job["model"])
    planned = plan.make(checkpoint, recipe, job["scheme"], job["format"], _linears(checkpoint))
    _check_model(checkpoint)
    config.patterns(policies)
    for warning in (*planned.warnings, *config.differences(policies)):
        on_event({"event": "warning", "message": warning})
    size = plan.output_bytes(checkpoint, planned.modes)
    if job["dry_run"]:
        return {
            "layers": plan.summary(planned),
            "calibration": {key: job["calibration"][key] for key in ("data", "samples", "seq_len")},
            "input_bytes": checkpoint.nbytes,
            "output_bytes": size,
        }
    python, torch_python = workers.environment("golden-stick"), workers.environment("native")
    output = Path(job["output"])
    check_free_space(output, 2 * size + _float_bytes(checkpoint, planned))
    text = _text(job, torch_python, on_event)
    with _between(output) as folder:
        (folder / "scratch").mkdir()
        made = workers.run(
            "qtool.engines.golden_stick.worker",
            {
                "model": str(view.make(checkpoint, folder / "model")),
                "policies": policies,
                "ids": text["ids"],
                "output": str(folder / "quantized"),
                "scratch": str(folder / "scratch"),
                "device": job["device"],
                "seed": job["calibration"]["seed"],
            },
            python=python,
            on_event=on_event,
            env=_environment(),
        )
        report = {
            "qtool": qtool.__version__,
            "versions": made["versions"],
            "engine": "golden-stick",
            "device": made["device"],
            "source": checkpoint.path.name,
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
                "modes": planned.modes,
                "report": report,
            },
            python=torch_python,
            on_event=on_event,
        )
    return {**report, **written}


def _check_model(checkpoint: Checkpoint) -> None:
    kind = checkpoint.config.get("model_type")
    if kind not in mindone.MODEL_TYPES:
        raise InputError(
            f"mindspore-gs can't quantize model_type {kind!r} here",
            where=str(checkpoint.path),
            hint=f"It takes {', '.join(mindone.MODEL_TYPES)}. Other models: --engine native.",
        )


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
        match = re.fullmatch(r"((?:.*\.)?layers\.\d+)\.(.+)", name)
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
                "smoothing": policy.smoothing,
                "alpha": None,
            },
        )
        row["linears"].append(linear)
        row["alpha"] = alphas.get(name, row["alpha"])
    return list(rows.values())
