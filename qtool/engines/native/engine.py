"""The native engine: quantizes a model layer by layer with torch, never holding more than one layer of it."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import qtool
from qtool.calibration.text import Calibration, load, load_tokenizer
from qtool.checkpoint import formats
from qtool.checkpoint.formats import Format
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import CheckpointWriter, check_free_space
from qtool.engines.native import memory, plan
from qtool.engines.native.stream import DecoderStream
from qtool.errors import InputError
from qtool.quant.layer import LayerResult, Storage, quantize_layer
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, find_groups, linear_layers, signature
from qtool.recipe.schema import Policy, Recipe

if TYPE_CHECKING:
    from qtool.workers import Report

_PROBE_TOKENS = 8
_SAMPLE_TOKENS = 512
_BATCH_TOKENS = 2048


def quantize(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Quantize a checkpoint.

    Job keys: model, output, format, recipe (the validated recipe as a dict), scheme, calibration ({"ids": [[int]]}
    or {"data", "samples", "seq_len", "seed"}), device, overwrite, trust_remote_code, dry_run.

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
    device = _device(job["device"])
    stream = DecoderStream(
        checkpoint,
        dtype=torch.float32 if exact else _compute_dtype(device),
        device=device,
        trust_remote_code=job["trust_remote_code"],
    )
    names = [
        f"{stream.layer_name(i)}.{n}" for i in range(stream.depth) for n in linear_layers(stream.skeleton_layer(i))
    ]
    planned = plan.make(checkpoint, recipe, scheme, job["format"], names)
    for warning in planned.warnings:
        report.warning(warning)
    size = plan.output_bytes(checkpoint, planned.modes)
    if job["dry_run"]:
        return _dry_run(job, stream, planned, size, recipe)
    check_free_space(Path(job["output"]), size)

    calibration = _calibration(job, checkpoint)
    output_format = formats.get(job["format"])
    writer = CheckpointWriter(
        Path(job["output"]),
        output_format,
        overwrite=job["overwrite"],
        max_shard_bytes=int(recipe.export.max_shard_gb * 1e9),
        expected_tensors=6 * len(checkpoint.names),
    )
    with writer:
        # What stays as it is comes first, so that damage in it shows at once.
        inside = {name for i in range(stream.depth) for name in _layer_tensors(checkpoint, stream.layer_name(i))}
        for name in checkpoint.names:
            if name not in inside:
                writer.add(name, stream.stored(name))
        groups, error = _quantize(stream, planned, calibration, recipe, output_format, writer, report)
        result = {
            "qtool": qtool.__version__,
            "versions": _versions(),
            "engine": "native",
            "device": str(stream.device),
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
            "mean_relative_error": error,
            "seconds": round(time.perf_counter() - started, 2),
            "peak_memory_bytes": memory.peak(),
            "layers": groups,
        }
        path = writer.finish(checkpoint, checkpoint.config, result)
    return {**result, "output": str(path), "output_bytes": size, "input_bytes": checkpoint.nbytes}


def _quantize(
    stream: DecoderStream,
    planned: plan.Plan,
    calibration: Calibration,
    recipe: Recipe,
    output_format: Format,
    writer: CheckpointWriter,
    report: Report,
) -> tuple[list[dict[str, Any]], float]:
    """All decoder layers; returns the report of every group and their mean relative output error."""
    hidden = stream.prologue(calibration.ids)
    topology: dict[Any, list[Group]] = {}
    rows: list[dict[str, Any]] = []
    for index in range(stream.depth):
        report.progress("quantize", index, stream.depth, "layers")
        prefix = stream.layer_name(index) + "."
        with stream.layer(index) as layer:
            key = signature(layer)
            if key not in topology:
                topology[key] = _probe(stream, index, layer, hidden)
            policies = {name: planned.policies[prefix + name] for name in linear_layers(layer)}
            results = _quantize_one(
                stream, index, layer, topology[key], policies, hidden, recipe.osl == "exact", output_format
            )
            _write(stream, index, layer, results, writer)
        rows += [{"layer": stream.layer_name(index), **dataclasses.asdict(group)} for group in results.groups]
        del results  # its weights would be in memory with the next layer's
    report.progress("quantize", stream.depth, stream.depth, "layers")
    return rows, sum(row["relative_error"] for row in rows) / len(rows)


def _write(stream: DecoderStream, index: int, layer: nn.Module, results: LayerResult, writer: CheckpointWriter) -> None:
    """Every tensor of a layer: quantized, as `layer` now has it, or as it was."""
    prefix = stream.layer_name(index) + "."
    state = layer.state_dict()
    for full_name in _layer_tensors(stream.checkpoint, stream.layer_name(index)):
        name = full_name.removeprefix(prefix)
        module, _, kind = name.rpartition(".")
        if module in results.linears:
            if kind == "weight":
                writer.add_linear(prefix + module, results.linears[module], _dtype(stream.checkpoint, full_name))
        elif name in state:
            writer.add(full_name, state[name].to(_dtype(stream.checkpoint, full_name)))
        else:
            writer.add(full_name, stream.checkpoint.tensor(full_name))


def _quantize_one(
    stream: DecoderStream,
    index: int,
    layer: nn.Module,
    groups: Sequence[Group],
    policies: dict[str, Policy | None],
    hidden: torch.Tensor,
    exact: bool,
    output_format: Format,
) -> LayerResult:
    """Observe the float layer on all samples, moving `hidden` on to its output in place; then quantize it."""
    tokens = hidden.shape[0] * hidden.shape[1]
    stride = 1 if exact else max(1, tokens // _SAMPLE_TOKENS)
    statistics: dict[str, InputStatistics] = {}
    handles = []
    for group in groups:
        wanted = [policy for name in group.linears if (policy := policies[name]) is not None]
        if not wanted:
            continue
        first = group.linears[0]
        with_gram = not exact and wanted[0].rounding == "gptq"
        statistics[first] = observed = InputStatistics(stride=stride, with_gram=with_gram)
        handles.append(
            layer.get_submodule(first).register_forward_pre_hook(lambda _m, args, seen=observed: seen.update(args[0]))
        )
    inputs = hidden.clone() if exact else hidden
    batch = max(1, _BATCH_TOKENS // hidden.shape[1])
    for row in range(0, hidden.shape[0], batch):
        hidden[row : row + batch] = stream.run(index, layer, inputs[row : row + batch])
    for handle in handles:
        handle.remove()
    dtype = _dtype(stream.checkpoint, stream.layer_name(index) + "." + groups[0].linears[0] + ".weight")
    layer.float()
    runs: list[Callable[[], torch.Tensor]] = []
    if exact:
        runs = [partial(stream.run, index, layer, inputs[row : row + 1]) for row in range(inputs.shape[0])]
    storage = Storage(
        dtype=dtype,
        weight_scale=lambda scale, static: output_format.storable_weight_scale(
            scale, "static" if static else "dynamic", dtype
        ),
        input_scale=lambda scale: output_format.storable_scale(scale, dtype),
    )
    return quantize_layer(layer, groups, policies, statistics, storage, search="exact" if exact else "fast", runs=runs)


def _probe(stream: DecoderStream, index: int, layer: nn.Module, hidden: torch.Tensor) -> list[Group]:
    """Topology of a layer, from a few tokens of random hidden states in float32."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, _PROBE_TOKENS, hidden.shape[2], generator=generator).to(stream.device)
    with stream.precision(torch.float32, _PROBE_TOKENS):
        layer.float()
        groups = find_groups(layer, lambda: stream.run(index, layer, few))
    layer.to(stream.dtype)
    return groups


def _calibration(job: dict[str, Any], checkpoint: Checkpoint) -> Calibration:
    wanted = job["calibration"]
    if "ids" in wanted:
        return Calibration(torch.tensor(wanted["ids"]), wanted["digest"], wanted["source"])
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=job["trust_remote_code"])
    return load(wanted["data"], tokenizer, samples=wanted["samples"], seq_len=wanted["seq_len"], seed=wanted["seed"])


def _dry_run(
    job: dict[str, Any], stream: DecoderStream, planned: plan.Plan, size: int, recipe: Recipe
) -> dict[str, Any]:
    wanted = job["calibration"]
    return {
        "layers": plan.summary(planned),
        "calibration": {key: wanted[key] for key in ("data", "samples", "seq_len") if key in wanted},
        "input_bytes": stream.checkpoint.nbytes,
        "output_bytes": size,
        **memory.estimate(stream, wanted["samples"], wanted["seq_len"], exact=recipe.osl == "exact"),
    }


def _layer_tensors(checkpoint: Checkpoint, layer_name: str) -> list[str]:
    return [name for name in checkpoint.names if name.startswith(layer_name + ".")]


def _dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    from qtool.checkpoint import dtypes

    dtype = dtypes.to_torch(checkpoint.info(name).dtype)
    if dtype is None or not dtype.is_floating_point:
        raise InputError(
            f"tensor {name} has dtype {checkpoint.info(name).dtype}, expected a float type",
            where=str(checkpoint.info(name).file),
            hint="quantize the original float model",
        )
    return dtype


def _compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def _device(wanted: str) -> str:
    """`auto` takes an accelerator that torch can use."""
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "npu": hasattr(torch, "npu") and torch.npu.is_available()}
    if wanted == "auto":
        return next(name for name in ("npu", "cuda", "cpu") if usable[name])
    if not usable[wanted]:
        raise InputError(f"torch can't use {wanted} here", where="--device", hint="use --device cpu")
    return wanted


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
