"""Integer arithmetic of W8A8: scales, zero points, rounding. Integers span -128..127 everywhere.

Scales follow mindspore-gs 1.4.1: symmetric 2·max|w| / 255, asymmetric (max - min) / 255, computed in
float64 and used in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

QMIN, QMAX = -128, 127
_STEPS = QMAX - QMIN


def symmetric_scale(amax: torch.Tensor) -> torch.Tensor:
    """Scale of a symmetric range [-amax, amax].

    Args:
        amax: non-negative, any shape.

    Returns:
        float32, same shape; 1 where amax is 0 so that an all-zero row stays representable.
    """
    scale = (amax.double() * 2 / _STEPS).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def asymmetric_scale_offset(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a range [low, high], widened to hold 0.

    Returns:
        (scale float32, offset float32 with integer values in -128..127), same shape as the arguments;
        q = clamp(round(x / scale + offset)).
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    scale = (high - low) / _STEPS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    offset = torch.round(QMIN - low / scale).clamp(QMIN, QMAX)
    return scale.float(), offset.float()


class QuantizedWeight(NamedTuple):
    """A weight rounded to nearest with one symmetric scale per row.

    Attributes:
        integers: int8 [out, in].
        scale: float32 [out].
        sums: float32 [out], of each row's integers: what a zero point of the input is multiplied by.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> QuantizedWeight:
        """Round `weight` float32 [out, in], which is overwritten."""
        scale = symmetric_scale(torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)))
        integers = weight.div_(scale[:, None]).round_().clamp_(max=QMAX)
        return cls(integers.to(torch.int8), scale, integers.sum(dim=1))


def per_tensor_product(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, weight: QuantizedWeight
) -> torch.Tensor:
    """x · Wᵀ with x float32 [tokens, in], which is overwritten, rounded per tensor; float32 [tokens, out].

    The integers are multiplied as such: exact, and on CPUs with VNNI four times as fast as float32.
    """
    q = x.div_(scale).add_(offset).round_().clamp_(QMIN, QMAX).to(torch.int8)
    return _integer_product(q, weight.integers).sub_(weight.sums * offset).mul_(weight.scale * scale)


def per_token_product(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """As `per_tensor_product`, but with one symmetric scale per token."""
    scale = symmetric_scale(x.abs().amax(dim=1, keepdim=True))
    q = x.div_(scale).round_().clamp_(max=QMAX).to(torch.int8)
    return _integer_product(q, weight.integers).mul_(weight.scale).mul_(scale)


def _integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · bᵀ of int8 matrices, summed in int32, given back as float32."""
    return torch._int_mm(a, b.t()).float()


def fake_quantize_tokens(x: torch.Tensor) -> torch.Tensor:
    """Per-token symmetric fake quantization over the last dimension (dynamic activations)."""
    scale = symmetric_scale(x.abs().amax(dim=-1, keepdim=True))
    return (x / scale).round_().clamp_(QMIN, QMAX).mul_(scale)


def fake_quantize_tensor(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Per-tensor asymmetric fake quantization with a given scale and zero point (static activations)."""
    return (x / scale).add_(offset).round_().clamp_(QMIN, QMAX).sub_(offset).mul_(scale)
