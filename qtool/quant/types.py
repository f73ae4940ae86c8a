"""What the numerical core hands to the checkpoint formats: one quantized linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.scheme import QuantizationArgs, Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear layer, free of any file format.

    Static: q = clamp(round(x / input_scale) + input_zero_point, qmin, qmax), one scale and zero point for the
    whole tensor, y = ((q - input_zero_point) @ weight.T) * input_scale * weight_scale + bias.
    Dynamic: one symmetric scale per token, 2·max|x| / steps, found at run time.

    Attributes:
        scheme: what qmin, qmax and steps are, and what shares a scale.
        weight: int8 [out, in], whatever its number of bits; or float8_e4m3fn.
        weight_scale: float32 [out], [1], [out, groups] or [blocks of rows, blocks of columns], as the scheme has it.
            A weight is worth (weight - weight_zero_point) * weight_scale. Scales are positive, unless the scheme has
            signed ones.
        bias: float [out] or None; formats store it in the model's dtype.
        input_scale: positive float where the scheme is static, else None.
        input_zero_point: integer in qmin..qmax where the scheme is static, else None.
        weight_zero_point: int8 of the scale's shape, in qmin..qmax; None where the weight is symmetric.
    """

    scheme: Scheme
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None
    weight_zero_point: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, width = self.weight.shape
        return out, width

    @property
    def is_static(self) -> bool:
        return self.scheme.is_static

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of the float weight that the stored numbers stand for, float32 [stop - start, in]."""
        args, scale, numbers = self.scheme.weights, self.weight_scale, self.weight[start:stop]
        if args.block_structure is not None:
            first = start // args.rows
            scale = scale[first : -(-(start + len(numbers)) // args.rows)].repeat_interleave(args.rows, dim=0)
            start -= first * args.rows
        if args.strategy != "tensor":
            scale = scale[start : start + len(numbers)]
        zero_point = self.weight_zero_point
        if zero_point is not None:
            zero_point = zero_point[start : start + len(numbers)]
        return dequantize(numbers, scale, args, zero_point)


@dataclass(frozen=True)
class CacheScales:
    """How keys, or values, of one layer are kept: q = clamp(round(x / scale) + zero_point).

    Attributes:
        scale: float32 [1], or [channels] of all heads, one after the other; positive.
        zero_point: float32 of the same shape, whole numbers; 0 where the range is symmetric.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor


@dataclass(frozen=True)
class QuantizedCache:
    """How the keys and values of one attention layer are kept, free of any file format.

    Attributes:
        args: what the numbers are, and what shares a scale.
        keys: as they enter the cache, after the rotary embedding.
        values: likewise.
    """

    args: QuantizationArgs
    keys: CacheScales
    values: CacheScales


def dequantize(
    numbers: torch.Tensor, scale: torch.Tensor, args: QuantizationArgs, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [out, in] of stored numbers [out, in].

    Args:
        scale: [out], [1], or [out, parts] of each row's groups of channels; all rows of a block have its scale.
        zero_point: whole numbers of the same shape, in any type; None where all are 0.
    """
    if zero_point is not None:
        parts = zero_point.reshape(len(numbers), -1)
        numbers = (numbers.unflatten(1, (parts.shape[1], -1)).float() - parts[:, :, None]).flatten(1)
    if args.type == "float":
        numbers = numbers.float()
    if scale.dim() == 1:
        return numbers * scale[:, None]
    if args.block_structure is not None:
        return numbers * scale.repeat_interleave(args.block_structure[1], dim=1)[:, : numbers.shape[1]]
    return (numbers.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
