"""Products of int8 matrices, which CPUs with VNNI compute four times as fast as those of float32, and exactly.

For trying many candidates; integers of fewer bits are computed with as int8 too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qtool.quant.integer import symmetric_scale
from qtool.scheme import QuantizationArgs

INT8 = QuantizationArgs(strategy="token", dynamic=True)
"""For products that stand for no scheme: a vector of 8 bits at a time."""


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
    def of(cls, weight: torch.Tensor, args: QuantizationArgs) -> QuantizedWeight:
        """Round `weight` float32 [out, in], which is overwritten."""
        scale = symmetric_scale(torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)), args)
        integers = weight.div_(scale[:, None]).round_().clamp_(max=args.qmax)
        return cls(integers.to(torch.int8), scale, integers.sum(dim=1))


class Range(NamedTuple):
    """Scale and zero point, float32: of a whole tensor [], or of each token [tokens, 1]."""

    scale: torch.Tensor
    zero_point: torch.Tensor


def asymmetric_product(
    x: torch.Tensor, input_range: Range, weight: QuantizedWeight, args: QuantizationArgs
) -> torch.Tensor:
    """x · Wᵀ with x float32 [tokens, in], which is overwritten, rounded with a zero point; float32 [tokens, out]."""
    scale, zero_point = input_range
    q = x.div_(scale).add_(zero_point).round_().clamp_(args.qmin, args.qmax).to(torch.int8)
    return _integer_product(q, weight.integers).sub_(weight.sums * zero_point).mul_(weight.scale * scale)


def per_token_product(x: torch.Tensor, weight: QuantizedWeight, args: QuantizationArgs) -> torch.Tensor:
    """As `asymmetric_product`, but with one symmetric scale per token."""
    scale = symmetric_scale(x.abs().amax(dim=1, keepdim=True), args)
    q = x.div_(scale).round_().clamp_(max=args.qmax).to(torch.int8)
    return _integer_product(q, weight.integers).mul_(weight.scale).mul_(scale)


def _integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · bᵀ of int8 matrices, summed in int32, given back as float32. This is what knows int8."""
    return torch._int_mm(a, b.t()).float()
