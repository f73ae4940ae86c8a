"""Quantized rows as ggml's blocks of 32 numbers, each with a float16 scale: Q8_0 and Q4_0.

The layout is that of `block_q8_0` and `block_q4_0` in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.scheme import QuantizationArgs

if TYPE_CHECKING:
    import numpy as np

BLOCK = 32  # numbers
_FEW = 4  # bits that Q4_0 holds
_CHUNK = 1 << 22  # numbers that are packed at a time


@dataclass(frozen=True)
class Packed:
    """Blocks, and what it took to make them.

    Attributes:
        blocks: uint8 [..., bytes of a row].
        scale_rounding: the largest relative change of a scale, by its being float16.
    """

    blocks: np.ndarray
    scale_rounding: float


def block_type(weights: QuantizationArgs, columns: int) -> str | None:
    """The ggml type whose blocks hold such integers in rows of `columns`; None where there is none."""
    if weights.type != "int" or not weights.symmetric or weights.num_bits > 8 or columns % BLOCK:
        return None
    if weights.strategy not in ("tensor", "channel", "group") or (weights.group_size or BLOCK) % BLOCK:
        return None
    return "Q4_0" if weights.num_bits <= _FEW else "Q8_0"


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` numbers."""
    return columns // BLOCK * (2 + (BLOCK // 2 if kind == "Q4_0" else BLOCK))


def pack(kind: str, integers: np.ndarray, scales: np.ndarray) -> Packed:
    """Blocks of integers, which stay as they are.

    Args:
        kind: "Q8_0" or "Q4_0".
        integers: float32 [..., columns], whole numbers that the type holds.
        scales: float32 [..., parts]: `parts` divides a row into neighbours that share a scale.

    Raises:
        ValueError: numbers that are not whole, or out of range.
    """
    import numpy as np

    columns = integers.shape[-1]
    rows = integers.reshape(-1, columns)
    parts = scales.shape[-1]
    halves = scales.reshape(-1, parts).astype(np.float16)
    wide = halves.astype(np.float32)
    flat = scales.reshape(-1, parts)
    rounding = float(np.max(np.abs((wide - flat) / flat))) if flat.size else 0.0
    out = np.empty((len(rows), row_bytes(kind, columns)), np.uint8)
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        each = np.repeat(halves[part], columns // parts // BLOCK, axis=1).reshape(-1, 1)
        numbers = rows[part].reshape(-1, BLOCK)
        out[part] = np.concatenate([each.view(np.uint8), _numbers(kind, numbers)], axis=1).reshape(-1, out.shape[1])
    return Packed(out.reshape(*integers.shape[:-1], out.shape[1]), rounding)


def _numbers(kind: str, numbers: np.ndarray) -> np.ndarray:
    """uint8 [blocks, bytes] of float32 [blocks, 32]."""
    import numpy as np

    low, high = (-8, 7) if kind == "Q4_0" else (-128, 127)
    whole = np.rint(numbers)
    if whole.size and (float(np.max(np.abs(whole - numbers))) > 0 or whole.min() < low or whole.max() > high):
        raise ValueError(f"these are no integers from {low} to {high}")
    if kind == "Q8_0":
        return whole.astype(np.int8).view(np.uint8)
    shifted = (whole + 8).astype(np.uint8)
    half = BLOCK // 2
    return shifted[:, :half] | shifted[:, half:] << 4
