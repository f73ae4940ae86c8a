"""Worker: a quantized checkpoint in another format, or dequantized, without the original weights.

The integers are copied. So are the scales, where the new format holds them as they are: an input scale that the
runtime keeps in the model's dtype is rounded to it, and the result says by how much. A new scheme, float8, is what the
integers stand for, rounded again; the result says by how much that changed the weights. Everything is streamed, one
tensor at a time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import dtypes, formats
from qtool.checkpoint.companions import companions
from qtool.checkpoint.formats import DEQUANTIZED
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.reader import REPORT, Checkpoint
from qtool.checkpoint.transposed import is_transposed
from qtool.checkpoint.writer import CheckpointWriter, Sharding
from qtool.conversion.job import FormatJob
from qtool.conversion.plan import Conversion, plan
from qtool.conversion.rounding import Change, to_float8
from qtool.files import check_free_space, read_json
from qtool.scheme import named
from qtool.version import __version__

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear
    from qtool.workers import Report

_CHUNK = 1 << 24  # numbers that are dequantized at a time
_SHOWN = 1 << 24  # bytes between two reports of progress: there can be 100,000 tensors, most of them small


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a `FormatJob`.

    Returns:
        from, to, layers (how many by their scheme's label), integers (how many were carried over as they are),
        input_scale_rounding (largest relative change), weight_rounding (relative change of all weights that were
        rounded again, root mean square; 0 without), nbytes (of the new tensors), seconds, output.

    Raises:
        InputError: a source that is not quantized or damaged, or something that the new format can't express.
        QtoolError: the disk is full.
    """
    import torch  # noqa: F401 (so that its import is no part of the conversion's time)

    started, wanted = time.perf_counter(), FormatJob(**job)
    source = Checkpoint.open(wanted.source)
    companions(source)  # what can't be carried over is better said now than at the end
    conversion = plan(source, wanted.to, None if wanted.scheme is None else named(wanted.scheme))
    for warning in conversion.warnings:
        report.warning(warning)
    check_free_space(wanted.output, conversion.output_bytes(source))
    change = _write(source, conversion, wanted, report)
    labels = Counter(scheme.label for scheme in conversion.written.values())
    return {
        "from": conversion.format.name,
        "to": conversion.to,
        "layers": dict(labels),
        "integers": sum(
            math.prod(conversion.format.shape(Stored(source, name), scheme))
            for name, scheme in conversion.schemes.items()
            if not conversion.is_rounded(name)
        ),
        "input_scale_rounding": conversion.rounding,
        "weight_rounding": change.relative,
        "nbytes": Checkpoint.open(wanted.output).nbytes,
        "seconds": round(time.perf_counter() - started, 2),
        "output": wanted.output,
    }


def _write(source: Checkpoint, conversion: Conversion, job: FormatJob, report: Report) -> Change:
    change = Change()
    expected = 2 * len(source.names) + 8 * len(conversion.schemes)
    form = conversion.target or formats.PLAIN
    done = shown = 0
    with CheckpointWriter(job.output, form, overwrite=job.overwrite, sharding=Sharding(expected_tensors=expected)) as w:
        w.expect(source.names)
        for tensor in source.names:
            if done >= shown + _SHOWN or not done:
                report.progress("converting", done, source.nbytes, "bytes")
                shown = done
            done += source.info(tensor).nbytes
            owner, _, part = tensor.rpartition(".")
            if tensor in conversion.left_out:
                continue
            if owner not in conversion.schemes:
                w.add(tensor, _kept(source, tensor, conversion))
            elif part in conversion.format.weight_parts:
                _add_layer(w, source, owner, conversion, change)
        report.progress("converting", source.nbytes, source.nbytes, "bytes")
        w.finish(source, _config(source, conversion), _note(source, conversion, job.scheme, change))
    return change


def _kept(source: Checkpoint, name: str, conversion: Conversion) -> torch.Tensor:
    """A tensor of no quantized layer: as it is, but in bfloat16 if the model becomes bfloat16 and it has its dtype."""
    tensor = source.tensor(name)
    narrowed = conversion.target is None and source.info(name).dtype == conversion.dtype
    return tensor.bfloat16() if narrowed else tensor


def _add_layer(writer: CheckpointWriter, source: Checkpoint, name: str, conversion: Conversion, change: Change) -> None:
    linear = conversion.format.read(Stored(source, name), conversion.schemes[name])
    if conversion.target is None:
        _add_float(writer, name, linear, transposed=is_transposed(source.config, name))
        return
    dtype = dtypes.to_torch(conversion.dtype)
    assert dtype is not None
    if conversion.is_rounded(name):
        target, scheme = conversion.target, conversion.written[name]
        linear = to_float8(linear, scheme, lambda scale: target.storable_weight_scale(scale, scheme, dtype), change)
    elif linear.input_scale is not None:
        scale = conversion.target.storable_scale(linear.input_scale, dtype)
        linear = dataclasses.replace(linear, input_scale=scale)
    writer.add_linear(name, linear, dtype, transposed=is_transposed(source.config, name))


def _add_float(writer: CheckpointWriter, name: str, linear: QuantizedLinear, *, transposed: bool) -> None:
    import torch

    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        weight[start : start + rows] = linear.dequantize(start, start + rows)
    writer.add(f"{name}.weight", weight.t() if transposed else weight)
    if linear.bias is not None:
        writer.add(f"{name}.bias", linear.bias.bfloat16())


def _config(source: Checkpoint, conversion: Conversion) -> dict[str, Any]:
    """config.json without what the old format wrote into it."""
    config = {key: value for key, value in source.config.items() if key not in conversion.format.config_keys}
    if conversion.target is not None:
        return config
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": DEQUANTIZED}


def _note(source: Checkpoint, conversion: Conversion, scheme: str | None, change: Change) -> dict[str, Any]:
    """The source's qtool.json, saying that this was converted."""
    found = source.path / REPORT
    report = read_json(found) if found.is_file() else {"qtool": __version__, "source": source.path.name}
    step = {
        "qtool": __version__,
        "from": conversion.format.name,
        "to": conversion.to,
        "input_scale_rounding": conversion.rounding,
        **({} if scheme is None else {"scheme": scheme, "weight_rounding": change.relative}),
    }
    before = report.get("converted")
    steps = [*(before if isinstance(before, list) else []), step]
    now = {"format": conversion.to} | ({} if scheme is None else {"scheme": scheme})
    return {**report, **now, "converted": steps}
