"""The range of a static per-tensor activation, from calibration statistics."""

from __future__ import annotations

import torch

from qtool.quant.integer import asymmetric_parameters, fake_quantize_tensor
from qtool.quant.statistics import Smoothed
from qtool.recipe.policy import Observer
from qtool.scheme import QuantizationArgs

_SHRINKS = 60


def static_range(inputs: Smoothed, observer: Observer, args: QuantizationArgs) -> tuple[float, float]:
    """The range to quantize.

    Args:
        inputs: what calibration knows; the percentile and MSE observers work on its sample.
        observer: how to choose.
        args: of the activations.

    Returns:
        (minimum, maximum).
    """
    bottom, top = torch.stack((inputs.low.min(), inputs.high.max())).tolist()
    if observer.method == "minmax":
        return bottom, top
    flat = inputs.sample.flatten()
    if observer.method == "percentile":
        # kthvalue, unlike quantile, takes any number of elements.
        k = max(1, round(flat.numel() * observer.percentile / 100))
        below, above = torch.stack(((-flat).kthvalue(k).values, flat.kthvalue(k).values)).tolist()
        return -below, above
    return _least_error_range(flat, bottom, top, args)


def _least_error_range(flat: torch.Tensor, bottom: float, top: float, args: QuantizationArgs) -> tuple[float, float]:
    """Shrink both ends together and keep the range with the least mean squared error."""
    best, least = (bottom, top), float("inf")
    for step in range(_SHRINKS):
        factor = 1 - step / _SHRINKS
        low, high = torch.tensor(bottom * factor), torch.tensor(top * factor)
        scale, zero_point = asymmetric_parameters(low, high, args)
        error = float((fake_quantize_tensor(flat, scale, zero_point, args) - flat).square_().mean())
        if error < least:
            best, least = (float(low), float(high)), error
    return best
