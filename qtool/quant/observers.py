"""The range of a static per-tensor activation, from calibration statistics."""

from __future__ import annotations

import torch

from qtool.quant.integer import asymmetric_scale_offset, fake_quantize_tensor
from qtool.recipe.policy import Observer

_SHRINKS = 60


def static_range(
    low: torch.Tensor, high: torch.Tensor, sample: torch.Tensor, observer: Observer
) -> tuple[float, float]:
    """The range to quantize.

    Args:
        low, high: per-channel extremes over all tokens, float32 [in].
        sample: some of the tokens, float32 [tokens, in]; the percentile and MSE observers work on these.
        observer: how to choose.

    Returns:
        (minimum, maximum).
    """
    bottom, top = float(low.min()), float(high.max())
    if observer.method == "minmax":
        return bottom, top
    flat = sample.flatten().float()
    if observer.method == "percentile":
        # kthvalue, unlike quantile, takes any number of elements.
        k = max(1, round(flat.numel() * observer.percentile / 100))
        return -float((-flat).kthvalue(k).values), float(flat.kthvalue(k).values)
    return _least_error_range(flat, bottom, top)


def _least_error_range(flat: torch.Tensor, bottom: float, top: float) -> tuple[float, float]:
    """Shrink both ends together and keep the range with the least mean squared error."""
    best, least = (bottom, top), float("inf")
    for step in range(_SHRINKS):
        factor = 1 - step / _SHRINKS
        low, high = torch.tensor(bottom * factor), torch.tensor(top * factor)
        scale, offset = asymmetric_scale_offset(low, high)
        error = float((fake_quantize_tensor(flat, scale, offset) - flat).square_().mean())
        if error < least:
            best, least = (float(low), float(high)), error
    return best
