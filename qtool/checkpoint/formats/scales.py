"""Scales as they can be stored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qtool.errors import QtoolError

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear


def round_to(value: float, dtype: torch.dtype) -> float:
    """`value` rounded to `dtype`, kept above zero."""
    import torch

    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return max(float(rounded), torch.finfo(dtype).tiny)


def are_scales(numbers: torch.Tensor, *, signed: bool = False) -> bool:
    """Whether all are finite and positive; where they are signed, finite and not 0."""
    import torch

    return bool((torch.isfinite(numbers) & ((numbers != 0) if signed else (numbers > 0))).all())


def check_scales(name: str, linear: QuantizedLinear) -> None:
    """Raises QtoolError unless scales are finite, and positive where they must be, and zero points the scheme's."""
    scale = linear.weight_scale
    if not are_scales(scale, signed=linear.scheme.has_signed_scales):
        raise QtoolError(
            "a weight scale is not a positive number", where=name, hint="Check the weights for NaN or Inf."
        )
    weights, zero_points = linear.scheme.weights, linear.weight_zero_point
    if (zero_points is None) != weights.symmetric or (zero_points is not None and zero_points.shape != scale.shape):
        raise QtoolError("zero points of the weight are missing, or not those of its scales", where=name)
    inputs = linear.scheme.activations
    if inputs is None or inputs.dynamic:
        return
    if linear.input_scale is None or not (math.isfinite(linear.input_scale) and linear.input_scale > 0):
        raise QtoolError(f"input scale {linear.input_scale} is not a positive number", where=name)
    if linear.input_zero_point is None or not inputs.qmin <= linear.input_zero_point <= inputs.qmax:
        what = f"input zero point {linear.input_zero_point} is not in {inputs.qmin}..{inputs.qmax}"
        raise QtoolError(what, where=name)
