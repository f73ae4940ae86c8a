"""What the numerical core hands to the checkpoint formats: one quantized linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedLinear:
    """A W8A8 linear layer, free of any file format.

    Static: q = clamp(round(x / input_scale) + input_offset, -128, 127), one scale and offset for the
    whole tensor, y = ((q - input_offset) @ weight.T) * input_scale * weight_scale + bias.
    Dynamic (`input_scale` is None): one symmetric scale per token, 2·max|x| / 255, found at run time.

    Attributes:
        weight: int8 [out, in], symmetric (zero point 0).
        weight_scale: float32 [out]; the float weight is weight * weight_scale[:, None].
        bias: float [out] or None; formats store it in the model's dtype.
        input_scale: positive float, or None when activations are quantized per token at run time.
        input_offset: integer in -128..127 (the zero point), or None as above.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None = None
    input_scale: float | None = None
    input_offset: int | None = None

    @property
    def is_static(self) -> bool:
        return self.input_scale is not None

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of the float weight that the integers stand for, float32 [stop - start, in]."""
        return self.weight[start:stop] * self.weight_scale[start:stop, None]
