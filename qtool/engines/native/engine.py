"""The native engine: quantizes a model layer by layer with torch, never holding more than one layer of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import qtool
from qtool.calibration.text import Calibration, load, load_tokenizer
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.storage import check_free_space, resumable_bytes
from qtool.checkpoint.writer import CheckpointWriter
from qtool.engines.native import executor, memory, plan
from qtool.engines.native.layers import Layers
from qtool.engines.native.units import Source
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.recipe.schema import Recipe

if TYPE_CHECKING:
    from qtool.workers import Report

_CLUSTER = 64  # processes that a cluster may have; how many is known only once it is reached


def quantize(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize a checkpoint.

    Args:
        job: a `qtool.engines.job.Job` as a dict.
        report: hears of progress and warnings.

    Returns:
        The report that also goes into qtool.json; for a dry run the plan.
    """
    started = time.perf_counter()
    recipe = Recipe.model_validate(job["recipe"])
    scheme: str = job["scheme"]
    checkpoint = Checkpoint.open(job["model"])
    plan.refuse_quantized(checkpoint)
    exact = recipe.osl == "exact"
    torch.manual_seed(job["calibration"]["seed"])
    torch.set_num_threads(job["threads"] or torch.get_num_threads())
    device = _device(job["device"], exact=exact)
    executor.check(job["workers"], job["ray"])  # before there is a writer, which wrong input makes drop what it resumes
    stream = DecoderStream(
        checkpoint,
        dtype=torch.float32 if exact else _compute_dtype(device),
        device=device,
        trust_remote_code=job["trust_remote_code"],
    )
    planned = plan.make(checkpoint, recipe, scheme, job["format"], stream.linears())
    stream.prologue(torch.tensor([[0, 1]]))  # what can't be run shows before any work, and in a dry run
    if exact and any(stream.routed(i) for i in range(stream.depth)):
        raise InputError(
            "osl: exact compares the output of whole layers, which takes all experts at once",
            where=f"recipe {recipe.name}",
            hint="use osl: fast for mixtures of experts",
        )
    for warning in planned.warnings:
        report.warning(warning)
    size = plan.output_bytes(stream.weights, planned.modes)
    wanted = job["calibration"]
    estimate = memory.plan(
        stream,
        planned.policies,
        wanted["samples"],
        wanted["seq_len"],
        exact=exact,
        limit=job["memory"],
        processes=job["workers"] or (_CLUSTER if job["ray"] else 0),
    )
    if job["dry_run"]:
        return {
            "layers": plan.summary(planned),
            "calibration": {key: wanted[key] for key in ("data", "samples", "seq_len") if key in wanted},
            "input_bytes": checkpoint.nbytes,
            "output_bytes": size,
            **memory.describe(estimate, memory.seconds(stream, planned.policies, wanted["samples"], wanted["seq_len"])),
        }
    there = resumable_bytes(Path(job["output"])) if job["resume"] else 0
    check_free_space(Path(job["output"]), size + estimate.scratch_bytes - there)

    calibration = _calibration(job, checkpoint)
    source = Source(
        model=str(checkpoint.path),
        dtype=stream.dtype,
        device=device,
        trust_remote_code=job["trust_remote_code"],
        format=job["format"],
        threads=torch.get_num_threads(),
    )
    writer = CheckpointWriter(
        Path(job["output"]),
        formats.get(job["format"]),
        overwrite=job["overwrite"],
        max_shard_bytes=int(recipe.export.max_shard_gb * 1e9),
        expected_tensors=6 * len(checkpoint.names),
        key=_key(checkpoint, source, recipe, scheme, calibration),
        resume=job["resume"],
        restart=job["restart"],
    )
    with writer, executor.make(job["workers"], job["ray"]) as units:
        layers = Layers(
            stream,
            source,
            planned.policies,
            writer,
            units,
            report,
            exact=exact,
            batch_tokens=estimate.batch_tokens,
            layers_ahead=estimate.layers_ahead,
            expert_tokens=recipe.calibration.expert_tokens,
        )
        # What stays as it is comes first, so that damage in it shows at once.
        prefixes = tuple(stream.layer_name(i) + "." for i in range(stream.depth))
        for name in stream.weights.names:
            if not name.startswith(prefixes) and name not in writer:
                writer.add(name, stream.weights.unchanged(name))
        layers.quantize(calibration.ids)
        result = {
            "qtool": qtool.__version__,
            "versions": _versions(),
            "engine": "native",
            "device": str(stream.device),
            "threads": source.threads,
            "source": Path(job["model"]).name,
            "origin": checkpoint.origin,
            "format": job["format"],
            "recipe": recipe.model_dump(mode="json"),
            "scheme": scheme,
            "calibration": {
                "source": calibration.source,
                "sha256": calibration.digest,
                "samples": calibration.ids.shape[0],
                "seq_len": calibration.ids.shape[1],
            },
            "mean_relative_error": sum(row["relative_error"] for row in layers.rows) / max(1, len(layers.rows)),
            "layers": layers.rows,
            **({"experts": layers.experts} if layers.experts else {}),
        }
        path = writer.finish(checkpoint, checkpoint.config, result)
    return {
        **result,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_bytes": memory.peak(),
        "output": str(path),
        "output_bytes": size,
        "input_bytes": checkpoint.nbytes,
    }


def _key(checkpoint: Checkpoint, source: Source, recipe: Recipe, scheme: str, calibration: Calibration) -> str:
    """Equal for two jobs only when one can go on where the other ended."""
    files = sorted({checkpoint.info(name).file for name in checkpoint.names})
    parts = {
        "qtool": qtool.__version__,
        "versions": _versions(),
        "source": dataclasses.asdict(source) | {"dtype": str(source.dtype), "model": ""},
        "config": checkpoint.config,
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "policies": [policy.model_dump(mode="json") for policy in recipe.schemes[scheme]],
        "osl": recipe.osl,
        "expert_tokens": recipe.calibration.expert_tokens,
        "max_shard_gb": recipe.export.max_shard_gb,
        "calibration": calibration.digest,
        "tokens": list(calibration.ids.shape),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _calibration(job: dict[str, Any], checkpoint: Checkpoint) -> Calibration:
    wanted = job["calibration"]
    if "ids" in wanted:
        return Calibration(torch.tensor(wanted["ids"]), wanted["digest"], wanted["source"])
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=job["trust_remote_code"])
    return load(wanted["data"], tokenizer, samples=wanted["samples"], seq_len=wanted["seq_len"], seed=wanted["seed"])


def _compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def _device(wanted: str, *, exact: bool) -> str:
    """`auto` takes an accelerator that torch can use.

    osl: exact takes main memory, the only place that it has its integer products for.

    Raises InputError when torch can't use that device, or the job can't.
    """
    if exact:
        if wanted not in ("auto", "cpu"):
            raise InputError(
                f"osl: exact can't use {wanted}", where="--device", hint="use --device cpu, or osl: fast in the recipe"
            )
        return "cpu"
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "npu": hasattr(torch, "npu") and torch.npu.is_available()}
    if wanted == "auto":
        return next(name for name in ("npu", "cuda", "cpu") if usable[name])
    if not usable[wanted]:
        raise InputError(f"torch can't use {wanted} here", where="--device", hint="use --device cpu")
    return wanted


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
