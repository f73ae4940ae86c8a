"""What the numerical core hands to the checkpoint formats: one quantized linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.scheme import Scheme

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
        weight: int8 [out, in], symmetric (zero point 0), whatever its number of bits.
        weight_scale: float32 [out], [1] or [out, groups], as the scheme has it.
        bias: float [out] or None; formats store it in the model's dtype.
        input_scale: positive float where the scheme is static, else None.
        input_zero_point: integer in qmin..qmax where the scheme is static, else None.
    """

    scheme: Scheme
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None

    @property
    def is_static(self) -> bool:
        return self.scheme.is_static

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of the float weight that the integers stand for, float32 [stop - start, in]."""
        one = self.scheme.weights.strategy == "tensor"
        return dequantize(self.weight[start:stop], self.weight_scale if one else self.weight_scale[start:stop])


def dequantize(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of integers [out, in] and scales [out], [1] or [out, groups]."""
    if scale.dim() == 1:
        return integers * scale[:, None]
    return (integers.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
