"""GPTQ: Frantar et al. (arXiv 2210.17323), with the columns in the order of falling activation energy (act order).

Groups of input channels keep the scales that were found for them beforehand (static groups), so that the order of the
columns is nobody else's business.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from qtool.quant import threads
from qtool.quant.integer import storage_dtype, widened
from qtool.quant.rounding import graphs
from qtool.scheme import QuantizationArgs

_BLOCK = 64
_WORTH_A_GRAPH = 4 * _BLOCK  # columns
_DAMPINGS = 20  # each four times the one before: the last is larger than any rounding error


class GPTQ:
    """Rounds column by column, each time moving the error onto the columns still to come.

    Args:
        hessian: float32 [in, in], the mean of xᵀx, which is the Hessian up to a factor; overwritten.
        damping: [], added to its diagonal. The variance of the activations' own quantization noise belongs here:
            E|(x + noise)Ŵᵀ - xWᵀ|² is the weight error under hessian + variance·I. At least 0.1 % of the mean
            diagonal is added to keep the factorization stable.
        args: of the weights.
        tokens: that `hessian` is the mean over; None where it is exact. The correlations of `in` channels in so few
            tokens are partly chance, and errors that are moved along them come back on other text. So the diagonal is
            multiplied by 1 + in / tokens, at most 2: a shrinkage estimator, as Ledoit and Wolf's (2004). In a layer of
            SmolLM2 that took 1 to 12 % of the weights' error on other text with 8192 tokens, and 10 to 57 % with 2048.

        keep: a copy of the damped Hessian is kept.

    Attributes:
        hessian: that copy; None without.

    Raises ValueError when `hessian` holds NaN or infinite values.
    """

    def __init__(
        self,
        hessian: torch.Tensor,
        damping: float | torch.Tensor,
        args: QuantizationArgs,
        tokens: int | None = None,
        *,
        keep: bool = False,
    ) -> None:
        diagonal = hessian.diagonal()
        if tokens is not None:
            diagonal.mul_(1 + min(1.0, len(diagonal) / tokens))
        self._args = args
        self._order = torch.argsort(diagonal, descending=True, stable=True)
        diagonal.add_((1e-3 * widened(diagonal.mean())).clamp(min=damping).clamp(min=1e-12))
        self.hessian = hessian.clone() if keep else None
        self._inverse = _inverse_factor(hessian, self._order)

    @property
    def energy(self) -> torch.Tensor:
        """What a squared error of each channel's weight leaves of the output's, float32 [in].

        It is the channel's mean square less what the channels still to come explain of it, since those take that up.
        """
        found = torch.empty_like(self._inverse[0])
        found[self._order] = self._inverse.diagonal().square().reciprocal()
        return found

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 weight [out, in] in steps of scale [out] or [out, parts]: int8 or float8_e4m3fn [out, in].

        `zero_point` is what 0 becomes, whole numbers of the scale's shape; None for 0.
        """
        width = weight.shape[1]
        inverse = self._inverse
        # Rows are input channels, so that updates are contiguous. With one scale per output channel they are in its
        # units; where scales change along the row, an error moves on in the weight's own.
        in_units, size = scale.dim() == 1 and zero_point is None, self._args.columns or width
        work = (weight / scale[:, None] if in_units else weight)[:, self._order].t().contiguous()
        per_part = [] if in_units else [scale] if zero_point is None else [scale, zero_point]
        quantized = torch.empty(work.shape, dtype=torch.int8, device=weight.device)
        round_block = self._block_rounder(work, len(per_part))
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            block, factor = work[start:end], inverse[start:end, start:end]
            part = self._order[start:end] // size
            quantized[start:end], errors = round_block(
                block, factor, *(each.reshape(len(weight), -1).t()[part] for each in per_part)
            )
            if end < width:
                work[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(width, device=back.device)
        return quantized[back].t().contiguous().view(storage_dtype(self._args))

    def _block_rounder(self, work: torch.Tensor, per_element: int) -> graphs.Function:
        """What rounds one block after the other of `work` [in, out], with so many numbers for each of its elements; all
        of a shape but the last."""
        function = partial(_round_block, self._args)
        if graphs.usable(work.device) and len(work) >= _WORTH_A_GRAPH:
            few = work[:_BLOCK]
            examples = [few, few.new_ones(_BLOCK, _BLOCK), *[few] * per_element]
            return graphs.captured((self._args, per_element, work.shape[1], work.device), function, examples)
        return function


def _round_block(
    args: QuantizationArgs,
    block: torch.Tensor,
    factor: torch.Tensor,
    steps: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns [few, out] of a block, which is overwritten, one by one.

    Args:
        args: of the weight.
        factor: float32 [few, few], of the inverse.
        steps: the scale of each element, float32 [few, out]; None where the block is in its units.
        zero_points: of each element, float32 [few, out], beside steps; None where all are 0.

    Returns:
        (int8 [few, out], which are the bits of a float8, too; errors to move on, float32 [few, out]).
    """
    quantized, errors = torch.empty(block.shape, dtype=torch.int8, device=block.device), torch.empty_like(block)
    # Numbers are faster than tensors on a CPU; on a device they would have to be waited for.
    pivots = factor.diagonal().tolist() if block.device.type == "cpu" else factor.diagonal().unbind()
    with threads.single():
        for i, pivot in enumerate(pivots):
            column = block[i] if steps is None else block[i] / steps[i]
            if args.type == "float":
                stored = column.clamp(args.qmin, args.qmax).to(storage_dtype(args))
                quantized[i], q = stored.view(torch.int8), stored.float()
            elif zero_points is not None:
                q = column.round().add_(zero_points[i]).clamp_(args.qmin, args.qmax)
                quantized[i] = q
                q = q.sub_(zero_points[i])
            else:
                q = column.round().clamp_(args.qmin, args.qmax)
                quantized[i] = q
            error = torch.sub(block[i], q if steps is None else q.mul_(steps[i]), out=errors[i]).div_(pivot)
            if i + 1 < len(pivots):
                block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return quantized, errors


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Upper U with Uᵀ U = the inverse of `hessian` with rows and columns in this order; `hessian` is overwritten.

    There are three matrices of its size at once.

    Raises ValueError when `hessian` holds NaN or infinite values.
    """
    hessian.copy_(_with_memory(lambda matrix, order: matrix[order][:, order], hessian, order))
    hessian.copy_(_with_memory(_upper_factor, hessian))
    return _with_memory(_inverse_of_upper, hessian)


def _with_memory(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """What a function gives; computed in main memory where the device's is too small for it."""
    device = tensors[0].device
    try:
        return function(*tensors)
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    return function(*(tensor.cpu() for tensor in tensors)).to(device)


def _upper_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper R with R Rᵀ = hessian; more damping for as long as rounding makes `hessian` indefinite.

    With rows and columns reversed hessian is L Lᵀ, and R is L reversed back.

    Raises ValueError when `hessian` holds NaN or infinite values.
    """
    damping = widened(hessian.diagonal().mean()) * 1e-3
    for _ in range(_DAMPINGS):
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return lower.flip(0, 1)
        hessian.diagonal().add_(damping)
        damping = damping * 4
    raise ValueError("the Hessian is not finite")


def _inverse_of_upper(upper: torch.Tensor) -> torch.Tensor:
    # Column after column, as LAPACK has it: so it is solved in place.
    inverse = torch.eye(len(upper), dtype=upper.dtype, device=upper.device).mT
    return torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
