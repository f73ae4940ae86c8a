"""Rounding to nearest, within bounds."""

from __future__ import annotations

import torch

from qtool.quant.integer import to_grid
from qtool.scheme import QuantizationArgs


def round_to_nearest(
    weight: torch.Tensor,
    scale: torch.Tensor,
    bound: torch.Tensor,
    args: QuantizationArgs,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight [out, in] limited to ± bound, then rounded to nearest in steps of scale.

    Which way the bound itself rounds, often (qmax + ½) steps, decides between clipping ratios; so it is rounded in
    float32 like the values, as if they had been clamped first, which is what mindspore-gs 1.4.1 does.

    Args:
        weight: float32 [out, in].
        scale, bound: float32 [out], or [out, groups] where the input channels of a group share one. A scale may be
            negative.
        zero_point: whole numbers, float32 of the same shape: what 0 becomes. The range of the integers takes the place
            of the bound. None where all are 0.

    Returns:
        float32 [out, in], numbers in qmin..qmax.
    """
    if args.type == "float":  # its range is no matter of clipping
        return _round_floats(weight, scale, args)
    if zero_point is not None:
        grouped = weight.unflatten(1, (1 if scale.dim() == 1 else scale.shape[1], -1))
        step, zero = (each.view(len(weight), -1, 1) for each in (scale, zero_point))
        return (grouped / step).round_().add_(zero).clamp_(args.qmin, args.qmax).flatten(1)
    if scale.dim() == 2:
        grouped = weight.unflatten(1, (scale.shape[1], -1))
        return _round(grouped, scale[..., None], bound[..., None], args).flatten(1)
    return _round(weight, scale[:, None], bound[:, None], args)


def _round_floats(weight: torch.Tensor, scale: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    if scale.dim() == 1:
        return to_grid(weight / scale[:, None], args)
    assert args.columns is not None
    return to_grid(weight / scale.repeat_interleave(args.columns, dim=1)[:, : weight.shape[1]], args)


def _round(weight: torch.Tensor, scale: torch.Tensor, bound: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    q = (weight / scale).round_()
    reach = (bound / scale.abs()).round_()
    torch.minimum(q, reach.clamp(max=args.qmax), out=q)
    return torch.maximum(q, -reach.clamp(max=-args.qmin), out=q)


def clamp_rows(weight: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Each row of weight [out, in] limited to ± bound [out]."""
    return torch.minimum(torch.maximum(weight, -bound[:, None]), bound[:, None])
