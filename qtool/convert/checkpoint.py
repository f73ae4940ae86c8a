"""Worker: a W8A8 checkpoint in another format, or dequantized, without the original weights.

The integers are copied. So are the scales, where the new format holds them as they are: an input scale that the
runtime keeps in the model's dtype is rounded to it, and the result says by how much. Everything is streamed,
one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import qtool
from qtool import runtimes
from qtool.checkpoint import dtypes, formats
from qtool.checkpoint.formats import Format, Mode
from qtool.checkpoint.formats.common import Stored, fused_name
from qtool.checkpoint.formats.golden_stick import TYPES
from qtool.checkpoint.reader import REPORT, Checkpoint, read_json
from qtool.checkpoint.summary import float_dtype
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import InputError
from qtool.files import check_free_space
from qtool.scheme import W8A8, W8A8_DYNAMIC

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear
    from qtool.workers import Report

FLOAT = "bfloat16"
TARGETS = (*formats.NAMES, FLOAT)

_SCHEMES = {"static": W8A8, "dynamic": W8A8_DYNAMIC, "float": None}

# Everything that the formats keep of a layer.
_PARTS = {"weight", "weight_scale", "weight_offset", "weight_zero_point", "bias", "deq_scale", "quant_bias"} | {
    "input_scale",
    "input_offset",
    "input_zero_point",
}
_MAX_ROUNDING = 2**-8  # relative; more than that and the dtype's range is too short for the scale
_CHUNK = 1 << 24  # numbers that are dequantized at a time
_SHOWN = 1 << 24  # bytes between two reports of progress: there can be 100,000 tensors, most of them small


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        target: a quantized format, or FLOAT.
        modes: every quantized layer, by its name without ".weight".
        dtype: safetensors code of the model's float tensors.
        warnings: what the new format's runtimes may not like.
        rounding: the largest relative change of an input scale.
    """

    target: str
    modes: dict[str, Mode]
    dtype: str
    warnings: list[str]
    rounding: float


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Convert the folder job["source"] to the format job["to"] (one of TARGETS), making job["output"].

    Further keys: overwrite.

    Returns:
        from, to, layers (how many, by mode), integers (how many were carried over as they are), input_scale_rounding
        (largest relative change), nbytes (of the new tensors), seconds, output.

    Raises:
        InputError: a source that is not W8A8 or damaged, or something that the new format can't express.
        QtoolError: the disk is full.
    """
    import torch  # noqa: F401 (so that its import is no part of the conversion's time)

    started = time.perf_counter()
    source = Checkpoint.open(job["source"])
    planned = plan(source, job["to"])
    for warning in planned.warnings:
        report.warning(warning)
    size = output_bytes(source, planned)
    check_free_space(job["output"], size)
    integers = _write(source, planned, job, report)
    modes = list(planned.modes.values())
    return {
        "from": source.format,
        "to": planned.target,
        "layers": {mode: modes.count(mode) for mode in ("static", "dynamic")},
        "integers": integers,
        "input_scale_rounding": planned.rounding,
        "nbytes": Checkpoint.open(job["output"]).nbytes,
        "seconds": round(time.perf_counter() - started, 2),
        "output": job["output"],
    }


# ------------------------------------------------------------------ what will be done, and whether it can be


def plan(source: Checkpoint, target: str) -> Plan:
    """Decide how every tensor is converted, from headers, descriptions and static layers' input scales.

    Raises:
        InputError: whatever makes the conversion impossible, before anything is written.
    """
    _check_formats(source, target)
    modes = _modes(source)
    dtype = float_dtype(source, modes) or "BF16"
    if target == FLOAT:
        return Plan(target, modes, dtype, [], 0.0)
    warnings = _expressible(source, target, modes, dtype)
    return Plan(target, modes, dtype, warnings, _check_inputs(source, formats.get(target), modes, dtype))


def _check_formats(source: Checkpoint, target: str) -> None:
    where, form = str(source.path), source.format
    if form == "float":
        hint = f"Quantize it: qtool quantize {source.path}" + ("" if target == FLOAT else f" --format {target}")
        raise InputError("this model is float already" if target == FLOAT else "not quantized", where=where, hint=hint)
    if form not in formats.NAMES:
        hint = f"It reads {', '.join(formats.NAMES)}."
        raise InputError(f"quantized with {form}, which qtool doesn't read", where=where, hint=hint)
    if form == target:
        raise InputError(f"this checkpoint is {form} already", where=where)
    quantization = source.config.get("quantization_config")
    cache = isinstance(quantization, dict) and quantization.get("kv_cache_scheme")
    if cache and form == "compressed-tensors":
        raise InputError("its key/value cache is quantized too, which is not converted", where=where)


def _modes(source: Checkpoint) -> dict[str, Mode]:
    form, modes = formats.get(source.format), dict[str, Mode]()
    for tensor in source.names:
        name = tensor.removesuffix(".weight")
        if name == tensor:
            continue
        mode, stored = form.mode(source, name), Stored(source, name)
        if mode is None:
            raise stored.error("quantized, but not W8A8 with per-tensor static or per-token dynamic activations")
        if mode != "float":
            assert stored.shape
            modes[name] = mode
        elif source.info(tensor).dtype == "I8":
            raise stored.error("its weight is int8, but nothing says how it is quantized")
    if not modes:
        raise InputError("no layer of this model is quantized", where=str(source.path))
    for tensor in source.names:
        owner, _, part = tensor.rpartition(".")
        if owner in modes and part not in _PARTS:
            raise Stored(source, owner).error(
                f"has a tensor {part!r}, which is none of {source.format}'s that qtool knows"
            )
    _check_description(source, modes)
    return modes


def _check_description(source: Checkpoint, modes: Mapping[str, Mode]) -> None:
    """Refuse what a golden-stick or modelslim description says of anything else than linear layers."""
    if source.format == "compressed-tensors":
        return
    for name, kind in source.description.items():
        if name in source and name.rpartition(".")[0] not in modes and kind != TYPES["float"]:
            raise InputError(f"{name} is {str(kind)[:40]}, which is not converted", where=str(source.path))
    for key in ("kv_quant_type", "kv_cache_type", "fa_quant_type", "indexer_quant_type"):
        if source.description.get(key) not in (None, "", "FLOAT"):
            what = f"its key/value cache is quantized too ({key}: {source.description[key]}), which is not converted"
            raise InputError(what, where=str(source.path))


def _expressible(source: Checkpoint, target: str, modes: Mapping[str, Mode], dtype: str) -> list[str]:
    """What the runtimes of `target` may not like. Raises InputError for what they can't load."""
    linears: dict[str, Mode] = {
        name: modes.get(name, "float")
        for tensor in source.names
        if (name := tensor.removesuffix(".weight")) != tensor and len(source.info(tensor).shape) == 2
    }
    where = str(source.path)
    problems = formats.get(target).problems(linears)
    if fatal := next((problem for problem in problems if problem.fatal), None):
        raise InputError(f"{target} can't express this: {fatal}", where=where, hint=f"--to {FLOAT} can.")
    schemes = {name: _SCHEMES[mode] for name, mode in linears.items()}
    limitations = runtimes.problems(target, source.config, schemes, dtype)
    for limitation in limitations:
        if limitation.fatal or limitation.unread:
            raise InputError(limitation.text, where=where, hint=limitation.hint)
    return [str(problem) for problem in (*problems, *limitations)]


def _check_inputs(source: Checkpoint, form: Format, modes: Mapping[str, Mode], dtype: str) -> float:
    """The largest relative change of a static layer's input scale. Raises InputError for scales that can't be kept."""
    reader, model_dtype = formats.get(source.format), dtypes.to_torch(dtype)
    siblings: dict[str, tuple[str, tuple[float, int]]] = {}
    largest = 0.0
    for name, mode in modes.items():
        if mode != "static":
            continue
        stored = Stored(source, name)
        scale, offset = inputs = reader.inputs(stored)
        change = abs(form.storable_scale(scale, model_dtype) - scale) / scale
        if not change <= _MAX_ROUNDING:
            raise stored.error(
                f"{form.name} holds input scales in the model's dtype, and {dtype} changes {scale:.4g} by {change:.1%}"
            )
        largest = max(largest, change)
        fused = fused_name(name)
        first, expected = siblings.setdefault(fused or name, (name, inputs))
        if inputs != expected:
            raise stored.error(
                f"its input scale and offset ({scale:.6g}, {offset}) differ from those of {first} "
                f"({expected[0]:.6g}, {expected[1]}), but runtimes load one of them for both"
            )
    return largest


def output_bytes(source: Checkpoint, planned: Plan) -> int:
    """Size of the new tensors: the same but for what the formats add to a layer, or two bytes for every number."""
    total = 0
    for tensor in source.names:
        info = source.info(tensor)
        owner, _, part = tensor.rpartition(".")
        if owner not in planned.modes:
            narrowed = planned.target == FLOAT and info.dtype == planned.dtype
            total += info.nbytes * 16 // dtypes.BITS[info.dtype] if narrowed else info.nbytes
        elif part == "bias":
            total += info.nbytes
        elif part == "weight":
            rows, columns = info.shape
            extra = {FLOAT: rows * columns, "golden-stick": 16 * rows + 3 * columns}.get(planned.target, 24 * rows)
            total += rows * columns + extra
    return total


# ------------------------------------------------------------------ doing it


def _write(source: Checkpoint, planned: Plan, job: dict[str, Any], report: Report) -> int:
    """Write the new checkpoint; how many integers it took over."""
    reader, integers, done, shown = formats.get(source.format), 0, 0, 0
    dtype = dtypes.to_torch(planned.dtype)
    assert dtype is not None
    form = formats.get("safetensors" if planned.target == FLOAT else planned.target)
    # MindIE marks a quantized model in config.json as well.
    config = {key: value for key, value in source.config.items() if key != "quantize"}
    if planned.target == FLOAT:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": FLOAT}
    expected = 2 * len(source.names) + 8 * len(planned.modes)
    with CheckpointWriter(job["output"], form, overwrite=job["overwrite"], expected_tensors=expected) as writer:
        for tensor in source.names:
            if done >= shown + _SHOWN or not done:
                report.progress("converting", done, source.nbytes, "bytes")
                shown = done
            done += source.info(tensor).nbytes
            owner, _, part = tensor.rpartition(".")
            mode = planned.modes.get(owner)
            if mode is None:
                writer.add(tensor, _narrowed(source, tensor, planned))
            elif part == "weight":
                linear = reader.read(Stored(source, owner), mode)
                integers += linear.weight.numel()
                if planned.target == FLOAT:
                    _add_float(writer, owner, linear)
                else:
                    writer.add_linear(owner, _storable(linear, form, dtype), dtype)
        report.progress("converting", source.nbytes, source.nbytes, "bytes")
        writer.finish(source, config, _note(source, planned))
    return integers


def _storable(linear: QuantizedLinear, form: Format, dtype: torch.dtype) -> QuantizedLinear:
    if linear.input_scale is None:
        return linear
    return dataclasses.replace(linear, input_scale=form.storable_scale(linear.input_scale, dtype))


def _narrowed(source: Checkpoint, name: str, planned: Plan) -> torch.Tensor:
    """A tensor of no quantized layer: as it is, but in bfloat16 if the model becomes bfloat16 and it has its dtype."""
    tensor = source.tensor(name)
    return tensor.bfloat16() if planned.target == FLOAT and source.info(name).dtype == planned.dtype else tensor


def _add_float(writer: CheckpointWriter, name: str, linear: QuantizedLinear) -> None:
    import torch

    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        weight[start : start + rows] = linear.dequantize(start, start + rows)
    writer.add(f"{name}.weight", weight)
    if linear.bias is not None:
        writer.add(f"{name}.bias", linear.bias.bfloat16())


def _note(source: Checkpoint, planned: Plan) -> dict[str, Any]:
    """The source's qtool.json, saying that this was converted."""
    found = source.path / REPORT
    report = read_json(found) if found.is_file() else {"qtool": qtool.__version__, "source": source.path.name}
    step = {
        "qtool": qtool.__version__,
        "from": source.format,
        "to": planned.target,
        "input_scale_rounding": planned.rounding,
    }
    before = report.get("converted")
    steps = [*(before if isinstance(before, list) else []), step]
    return {**report, "format": planned.target, "converted": steps}
