"""GPTQ: Frantar et al. (arXiv 2210.17323), with the columns in the order of falling activation energy (act order).

Groups of input channels keep the scales that were found for them beforehand (static groups), so that the order of the
columns is nobody else's business.
"""

from __future__ import annotations

import torch

from qtool.quant import threads
from qtool.scheme import QuantizationArgs

REMAINDER = 0.3  # of the rounding noise that it leaves; measured 0.2 to 0.5 on SmolLM2
_BLOCK = 64
_DAMPINGS = 20  # each four times the one before: the last is larger than any rounding error


class GPTQ:
    """Rounds column by column, each time moving the error onto the columns still to come.

    Args:
        hessian: float32 [in, in], the mean of xᵀx, which is the Hessian up to a factor; overwritten.
        damping: added to its diagonal. The variance of the activations' own quantization noise belongs here:
            E|(x + noise)Ŵᵀ - xWᵀ|² is the weight error under hessian + variance·I. At least 0.1 % of the mean
            diagonal is added to keep the factorization stable.
        args: of the weights.

    Raises ValueError when `hessian` holds NaN or infinite values.
    """

    def __init__(self, hessian: torch.Tensor, damping: float, args: QuantizationArgs) -> None:
        diagonal = hessian.diagonal()
        self._args = args
        self._order = torch.argsort(diagonal, descending=True, stable=True)
        diagonal.add_(max(damping, 1e-3 * float(diagonal.mean()), 1e-12))
        self._inverse = _inverse_factor(hessian[self._order][:, self._order])

    def round(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Float32 weight [out, in] in steps of scale [out] or [out, groups]: int8 [out, in]."""
        width = weight.shape[1]
        inverse = self._inverse
        # Rows are input channels, so that updates are contiguous. With one scale per output channel they are in its
        # units; where scales change along the row, an error moves on in the weight's own.
        steps = self._steps(scale, width)
        work = (weight if steps is not None else weight / scale[:, None])[:, self._order].t().contiguous()
        quantized = torch.empty(work.shape, dtype=torch.int8, device=weight.device)
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            block, factor = work[start:end], inverse[start:end, start:end]
            errors = torch.empty_like(block)
            self._round_block(block, factor, None if steps is None else steps[start:end], quantized[start:end], errors)
            if end < width:
                work[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(width, device=back.device)
        return quantized[back].t().contiguous()

    def _steps(self, scale: torch.Tensor, width: int) -> list[torch.Tensor] | None:
        """The scale [out] of each column in their order; None with one scale per output channel."""
        if scale.dim() == 1:
            return None
        by_group = scale.t().contiguous()
        size = width // len(by_group)
        return [by_group[channel // size] for channel in self._order.tolist()]

    def _round_block(
        self,
        block: torch.Tensor,
        factor: torch.Tensor,
        steps: list[torch.Tensor] | None,
        quantized: torch.Tensor,
        errors: torch.Tensor,
    ) -> None:
        """Round the columns [few, out] of a block one by one, into `quantized`, and give their `errors`."""
        pivots = factor.diagonal().tolist()
        with threads.single():
            for i, pivot in enumerate(pivots):
                column = block[i] if steps is None else block[i] / steps[i]
                q = column.round().clamp_(self._args.qmin, self._args.qmax)
                quantized[i] = q
                error = torch.sub(block[i], q if steps is None else q.mul_(steps[i]), out=errors[i]).div_(pivot)
                if i + 1 < len(pivots):
                    block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper U with Uᵀ U = hessian⁻¹; more damping for as long as rounding makes `hessian` indefinite.

    With rows and columns reversed, hessian = L Lᵀ; reversed back L is an upper R with hessian = R Rᵀ, and U = R⁻¹.

    Raises ValueError when `hessian` holds NaN or infinite values.
    """
    damping = float(hessian.diagonal().mean()) * 1e-3
    for _ in range(_DAMPINGS):
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        hessian.diagonal().add_(damping)
        damping *= 4
    raise ValueError("the Hessian is not finite")
