"""What mindspore-gs saved becomes a checkpoint of qtool's: any format, the source's dtypes and other files, qtool.json.

Runs in a process that has torch. Layers pass through `QuantizedLinear`, as those of the native engine do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import dtypes, formats
from qtool.checkpoint.formats import Description, Writable
from qtool.checkpoint.formats.described import TYPES
from qtool.checkpoint.formats.golden_stick import DESCRIPTION, GoldenStick
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import CheckpointWriter, Sharding
from qtool.engines.golden_stick import shards
from qtool.engines.golden_stick.tasks import Exported, ExportTask
from qtool.errors import QtoolError
from qtool.quant.types import QuantizedLinear
from qtool.scheme import PRESETS, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.workers import Report

    _Tensors = Iterator[tuple[str, torch.Tensor | QuantizedLinear]]

_INSIDE = re.compile(r".*\.layers\.\d+\..*")


def main(message: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do an `ExportTask`; answers with `Exported`.

    Raises:
        QtoolError: a layer is not quantized as planned, cards' parts don't fit together, or the disk is full.
    """
    task = ExportTask(**message)
    source, quantized = Checkpoint.open(task.source), Path(task.quantized)
    if task.schemes is None:
        parts = shards.Parts(quantized)
        tensors: _Tensors = parts.tensors(source)
        output_format: Writable = _AsDescribed(parts.types)
    else:
        schemes = {name: PRESETS[scheme] for name, scheme in task.schemes.items() if scheme is not None}
        tensors, output_format = _layers(source, Checkpoint.open(quantized), schemes), formats.get(task.format)
    writer = CheckpointWriter(
        Path(task.output),
        output_format,
        overwrite=task.overwrite,
        sharding=Sharding(int(task.max_shard_gb * 1e9), 6 * len(source.names)),
    )
    with writer:
        for index, (name, value) in enumerate(tensors):
            if index % 100 == 0:
                report.progress("export", index, 0, "tensors")
            if isinstance(value, QuantizedLinear):
                writer.add_linear(name, value, _dtype(source, f"{name}.weight"))
            else:
                writer.add(name, value)
        path = writer.finish(source, source.config, task.report)
    written = Checkpoint.open(path)
    return asdict(Exported(output=str(path), output_bytes=written.nbytes, input_bytes=source.nbytes))


def _layers(source: Checkpoint, quantized: Checkpoint, schemes: Mapping[str, Scheme]) -> _Tensors:
    """Every tensor in the source's order; quantized layers as a whole, by their names without ".weight"."""
    format = formats.of(quantized)
    for name in source.names:
        layer, _, part = name.rpartition(".")
        if scheme := schemes.get(layer):
            if part == "weight":
                linear = format.read_linear(quantized, layer) if name in quantized else None
                if linear is None or linear.scheme != scheme:
                    what = f"mindspore-gs did not quantize this layer ({scheme.label} was planned)"
                    raise QtoolError(what, where=layer)
                yield layer, linear
        elif _INSIDE.fullmatch(name) and name in quantized:  # smoothing rewrites norms and float linears
            yield name, quantized.tensor(name).to(_dtype(source, name))
        else:
            yield name, source.tensor(name)


def _dtype(source: Checkpoint, name: str) -> torch.dtype:
    dtype = dtypes.to_torch(source.info(name).dtype)
    assert dtype is not None
    return dtype


class _AsDescribed(GoldenStick):
    """golden-stick, with the types that mindspore-gs itself wrote down."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self._types = types

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        types = {name: self._types.get(name, TYPES[None]) for name in names}
        return Description(None, {DESCRIPTION: types})
