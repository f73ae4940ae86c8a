"""What mindspore-gs saved becomes a checkpoint of qtool's: any format, the source's dtypes, its other files, qtool.json.

Runs in a process that has torch. Layers pass through `QuantizedLinear`, as those of the native engine do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import dtypes, formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Write the checkpoint.

    Job keys: source and quantized (model folders), output, format, overwrite, max_shard_gb, modes (linear → static,
    dynamic or float, as planned), report (qtool.json).

    Returns:
        output, output_bytes, input_bytes.

    Raises:
        QtoolError: a layer is not quantized as planned, or the disk is full.
    """
    source, quantized = Checkpoint.open(job["source"]), Checkpoint.open(job["quantized"])
    decoder_layers = re.compile(r".*\.layers\.\d+\..*")
    writer = CheckpointWriter(
        Path(job["output"]),
        formats.get(job["format"]),
        overwrite=job["overwrite"],
        max_shard_bytes=int(job["max_shard_gb"] * 1e9),
        expected_tensors=6 * len(source.names),
    )
    with writer:
        for index, name in enumerate(source.names):
            if index % 100 == 0:
                report.progress("export", index, len(source.names), "tensors")
            layer, _, part = name.rpartition(".")
            mode = job["modes"].get(layer, "float")
            if mode == "float":
                # Smoothing rewrote norms and float linears; Golden Stick leaves what is outside of the layers as it was.
                inside = decoder_layers.fullmatch(name) and name in quantized
                writer.add(name, quantized.tensor(name).to(dtypes.to_torch(source.info(name).dtype)) if inside else source.tensor(name))
            elif part == "weight":
                linear = quantized.linear(layer) if name in quantized else None
                if linear is None or linear.is_static != (mode == "static"):
                    raise QtoolError(f"mindspore-gs did not quantize this layer ({mode} was planned)", where=layer)
                writer.add_linear(layer, linear, dtypes.to_torch(source.info(name).dtype))
        path = writer.finish(source, source.config, job["report"])
    written = Checkpoint.open(path)
    return {"output": str(path), "output_bytes": written.nbytes, "input_bytes": source.nbytes}
