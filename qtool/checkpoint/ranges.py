"""Worker: every tensor of a checkpoint with the range of its numbers, in constant memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtool import patterns
from qtool.checkpoint import dtypes, formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import schemes
from qtool.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qtool.workers import Report

_CHUNK = 1 << 25  # bytes read at a time


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Describe the tensors of the folder job["model"] whose names job["filter"] (a regex, or None) is found in.

    Each is an item, in the order in which the bytes lie in the files: name, dtype, shape, bytes, file, min and max (of
    the finite numbers; None where there are none, or where the dtype can't be read), nonfinite (how many are NaN or
    infinite); for the weight of a quantized layer also scheme ("W8A8 static" or "W8A8 dynamic"), scale_min and
    scale_max (of its weight scales).

    Returns:
        tensors, bytes: how many there were.

    Raises:
        InputError: a damaged file, or a quantized layer without scales.
    """
    checkpoint = Checkpoint.open(job["model"])
    filter = job["filter"] or ""
    wanted = [name for name in checkpoint.names if patterns.search(filter, name, where="--filter")]
    total = sum(checkpoint.info(name).nbytes for name in wanted)
    known = schemes(checkpoint)
    format = formats.of(checkpoint)
    scale_parts = format.scale_parts if isinstance(format, formats.QuantizedFormat) else ()
    done = 0
    for name in wanted:
        report.progress("reading", done, total, "bytes")
        row = _describe(checkpoint, name)
        owner, _, part = name.rpartition(".")
        if part in format.weight_parts and (scheme := known.get(owner)):
            row |= _scales(checkpoint, owner, scheme, scale_parts)
        report.item(row)
        done += checkpoint.info(name).nbytes
    report.progress("reading", total, total, "bytes")
    return {"tensors": len(wanted), "bytes": total}


def _describe(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    info = checkpoint.info(name)
    return {
        "name": name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": info.nbytes,
        "file": info.file.name,
        **measure(checkpoint, name),
    }


def _scales(checkpoint: Checkpoint, name: str, scheme: Scheme, parts: Sequence[str]) -> dict[str, Any]:
    """Of the first of these parts that the layer has."""
    part = next((part for part in parts if f"{name}.{part}" in checkpoint), parts[0])
    scales = measure(checkpoint, f"{name}.{part}")
    ends = {"scale_min": scales["min"], "scale_max": scales["max"]}
    if checkpoint.info(f"{name}.{part}").dtype == "U64":  # the bits of float32, as golden-stick has some
        ends = {key: None if bits is None else _of_bits(int(bits)) for key, bits in ends.items()}
    return {"scheme": scheme.label, **ends}


def _of_bits(bits: int) -> float | None:
    """The positive float32 of these bits; None for others. They are in the same order."""
    found: float | None = struct.unpack("<f", struct.pack("<I", bits))[0] if 0 <= bits < 1 << 31 else None
    return found


def measure(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """min, max and nonfinite of one tensor."""
    lowest: float | None = None
    highest: float | None = None
    nonfinite = 0
    dtype = dtypes.to_torch(checkpoint.info(name).dtype)
    if dtype is None or dtype.is_complex:
        return {"min": None, "max": None, "nonfinite": 0}
    for chunk in checkpoint.chunks(name, _CHUNK):
        numbers, bad = _finite(chunk)
        nonfinite += bad
        if numbers.numel():
            low, high = (extreme.item() for extreme in numbers.aminmax())
            lowest = low if lowest is None else min(lowest, low)
            highest = high if highest is None else max(highest, high)
    return {"min": lowest, "max": highest, "nonfinite": nonfinite}


def _finite(chunk: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Numbers that torch can compare, and how many were left out for being NaN or infinite."""
    import torch

    if chunk.dtype == torch.bool:
        return chunk.to(torch.uint8), 0
    if chunk.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has few operations for them
        return chunk.to(torch.float64) if chunk.dtype == torch.uint64 else chunk.to(torch.int64), 0
    if not chunk.is_floating_point():
        return chunk, 0
    numbers = chunk if chunk.dtype == torch.float64 else chunk.float()
    if all(bool(extreme.isfinite()) for extreme in numbers.aminmax()):
        return numbers, 0
    finite = numbers[numbers.isfinite()]
    return finite, numbers.numel() - finite.numel()
