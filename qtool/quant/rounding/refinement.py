"""After GPTQ: scales that fit the integers best, and integers that fit the scales best, in turn.

Both lessen the same error, (Ŵ - W) H (Ŵ - W)ᵀ of each row, which GPTQ goes down once, column by column, with scales
that were chosen before. Scales are a least-squares problem in as many unknowns as a row has scales. Integers take
turns, each at its minimum with all others as they are (coordinate descent, as QuantEase has it, arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qtool.quant import threads
from qtool.quant.integer import widened
from qtool.quant.rounding.clipping import Scales
from qtool.quant.types import dequantize
from qtool.scheme import QuantizationArgs

_ROUNDS = 2
_BLOCK = 64
_ELEMENTS = 1 << 24  # that the products for scales take at a time
_CLOSE = 2.0  # a scale doesn't change by more than this factor


@dataclass(frozen=True)
class Refinement:
    """Of the weights of one group of linears.

    Attributes:
        hessian: float32 [in, in], damped.
        args: of the weights: integers, a scale per channel or group.
        storable: rounds positive scales to what the checkpoint format keeps of them.
    """

    hessian: torch.Tensor
    args: QuantizationArgs
    storable: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, weight: torch.Tensor, integers: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, Scales]:
        """Better ones, of the same shapes and types; no row's error is larger than before, but for rounding.

        Args:
            weight: float32 [out, in].
            integers: int8 [out, in].
            scales: of them.
        """
        for _ in range(_ROUNDS):
            scales = self._fitted(weight, integers, scales)
            integers = self._descended(weight, integers, scales)
        return integers, self._fitted(weight, integers, scales)

    def error(self, weight: torch.Tensor, integers: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Of each row [out]."""
        delta = dequantize(integers, scales.scale, self.args, scales.zero_point) - weight
        return ((delta @ self.hessian) * delta).sum(dim=1)

    def _fitted(self, weight: torch.Tensor, integers: torch.Tensor, scales: Scales) -> Scales:
        """The best scales for these integers, as they can be stored; where that is no gain, the old ones."""
        scale = scales.scale.reshape(len(weight), -1)
        parts = scale.shape[1]
        centred = dequantize(integers, torch.ones_like(scale), self.args, scales.zero_point).view(
            len(weight), parts, -1
        )
        target = (weight @ self.hessian).view_as(centred)
        blocks = self.hessian.view(parts, -1, self.hessian.shape[1])
        found = torch.empty_like(scale)
        step = max(1, _ELEMENTS // (parts * weight.shape[1]))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            each = centred[rows]
            product = torch.einsum("ngk,gkj->ngj", each, blocks).unflatten(2, (parts, -1))
            matrix = widened(torch.einsum("nghk,nhk->ngh", product, each))
            known = widened((target[rows] * each).sum(dim=2))
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            ridge = diagonal.mean(dim=1, keepdim=True) * 1e-6 + 1e-20
            diagonal += ridge
            known += ridge * scale[rows]
            found[rows] = torch.linalg.solve_ex(matrix, known[:, :, None]).result[:, :, 0].float()
        ratio = found / scale
        usable = (ratio > 1 / _CLOSE) & (ratio < _CLOSE)  # and so not NaN
        kept = self.storable(torch.where(usable, found, scale).abs()) * scale.sign()
        tried = Scales(kept.view_as(scales.scale), scales.bound, scales.zero_point)
        better = self.error(weight, integers, tried) < self.error(weight, integers, scales)
        better = better.view(-1, *[1] * (scales.scale.dim() - 1))
        return Scales(torch.where(better, tried.scale, scales.scale), scales.bound, scales.zero_point)

    def _descended(self, weight: torch.Tensor, integers: torch.Tensor, scales: Scales) -> torch.Tensor:
        """One turn of all columns, which are contiguous rows here, those with the most energy first."""
        args, hessian = self.args, self.hessian
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        hessian = hessian[order][:, order]
        energy = hessian.diagonal()
        scale = scales.scale.reshape(len(weight), -1)
        part = order // (weight.shape[1] // scale.shape[1])
        delta = dequantize(integers, scales.scale, args, scales.zero_point) - weight
        slope = hessian @ delta.t()[order]  # half the gradient by the weight
        numbers = integers.t()[order].float()
        for start in range(0, len(order), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(order)))
            steps = scale.t()[part[block]]
            changes, within, own = torch.empty_like(steps), slope[block], hessian[block, block]
            with threads.single():
                for i in range(len(steps)):
                    old = numbers[start + i]
                    # Where the scale is negative, so is the step.
                    best = (old - within[i] / (energy[start + i] * steps[i])).round_().clamp_(args.qmin, args.qmax)
                    torch.sub(best, old, out=changes[i]).mul_(steps[i])
                    numbers[start + i] = best
                    within.addr_(own[i], changes[i])
            slope[:start].addmm_(hessian[:start, block], changes)
            slope[block.stop :].addmm_(hessian[block.stop :, block], changes)
        return numbers[back].t().contiguous().to(integers.dtype)
