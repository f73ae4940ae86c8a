"""Integer arithmetic of W8A8: scales, zero points, rounding. Integers span -128..127 everywhere.

Scales follow mindspore-gs 1.4.1: symmetric 2·max|w| / 255, asymmetric (max - min) / 255, computed in
float64 and used in float32.
"""

from __future__ import annotations

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


def quantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round a weight [out, in] to nearest with one scale per row [out]; returns int8."""
    return (weight / scale[:, None]).round_().clamp_(QMIN, QMAX).to(torch.int8)


def fake_quantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What `quantize_rows` represents, in float; one new tensor, no more."""
    return (weight / scale[:, None]).round_().clamp_(QMIN, QMAX).mul_(scale[:, None])


def fake_quantize_tokens(x: torch.Tensor) -> torch.Tensor:
    """Per-token symmetric fake quantization over the last dimension (dynamic activations)."""
    scale = symmetric_scale(x.abs().amax(dim=-1, keepdim=True))
    return (x / scale).round_().clamp_(QMIN, QMAX).mul_(scale)


def fake_quantize_tensor(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Per-tensor asymmetric fake quantization with a given scale and zero point (static activations)."""
    return (x / scale).add_(offset).round_().clamp_(QMIN, QMAX).sub_(offset).mul_(scale)
