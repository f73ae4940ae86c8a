"""From float weights to int8: a clipping ratio per output channel, then rounding.

`Compensation` is that of Frantar et al., "GPTQ" (arXiv 2210.17323), columns in the order of
falling activation energy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from qtool.quant import threads
from qtool.quant.integer import QMAX, QMIN, symmetric_scale

_BLOCK = 64
_DAMPINGS = 20  # each four times the one before: the last is larger than any rounding error


class RowError(Protocol):
    """Maps a weight error [rows, in] to each row's squared output error [rows]."""

    def __call__(self, delta: torch.Tensor) -> torch.Tensor: ...

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        """A lower bound of it that costs less."""
        ...


class ErrorOnTokens:
    """The error on given inputs x [tokens, in]; that on a few of them is the bound."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x, self._few = x, x[: max(1, len(x) // 8)]

    def __call__(self, delta: torch.Tensor) -> torch.Tensor:
        return (self._x @ delta.t()).square_().sum(dim=0)

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        return (self._few @ delta.t()).square_().sum(dim=0)


class ErrorByEnergy:
    """The expected error when input channels are uncorrelated, from their mean squares [in]."""

    def __init__(self, energy: torch.Tensor) -> None:
        self._energy = energy

    def __call__(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.square() @ self._energy

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.new_zeros(len(delta))  # the error itself is as cheap as any bound


def search_clip(
    weight: torch.Tensor,
    row_error: RowError | None,
    ratios: Sequence[float],
    storable: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the clipping ratio with the least error; the first of a tie.

    Args:
        weight: float32 [out, in].
        row_error: what to minimise; not looked at where there is only one ratio.
        ratios: fractions of max|row| to try, the widest first.
        storable: rounds a scale to what the checkpoint format keeps of it.

    Returns:
        (scale [out], bound [out]), float32.
    """
    peak = weight.abs().amax(dim=1)
    bound = peak * ratios[0]
    scale = storable(symmetric_scale(bound))
    if len(ratios) == 1 or row_error is None:
        return scale, bound
    least = torch.full_like(peak, float("inf"))
    for ratio in ratios:
        narrower = peak * ratio
        step = storable(symmetric_scale(narrower))
        delta = integers_within(weight, step, narrower).mul_(step[:, None]).sub_(weight)
        rows = (row_error.at_least(delta) < least).nonzero()[:, 0]
        error = row_error(delta if len(rows) == len(delta) else delta[rows])
        rows = rows[better := error < least[rows]]
        least[rows] = error[better]
        scale[rows] = step[rows]
        bound[rows] = narrower[rows]
    return scale, bound


def integers_within(weight: torch.Tensor, scale: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Each row of weight [out, in] limited to ± bound [out], then rounded to nearest in steps of scale [out].

    Which way the bound itself rounds, often 127.5 steps, decides between clipping ratios; so it is rounded in
    float32 like the values, as if they had been clamped first, which is what mindspore-gs 1.4.1 does.

    Returns:
        float32 [out, in], integers in -128..127.
    """
    q = (weight / scale[:, None]).round_()
    reach = (bound / scale).round_()[:, None]
    torch.minimum(q, reach.clamp(max=QMAX), out=q)
    return torch.maximum(q, -reach.clamp(max=-QMIN), out=q)


def clamp_rows(weight: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Each row of weight [out, in] limited to ± bound [out]."""
    return torch.minimum(torch.maximum(weight, -bound[:, None]), bound[:, None])


class Compensation:
    """Rounds column by column, each time moving the error onto the columns still to come.

    Args:
        gram: float32 [in, in], the mean of xᵀx; overwritten.
        ridge: added to its diagonal. The variance of the activations' own quantization noise belongs here:
            E|(x + noise)Ŵᵀ - xWᵀ|² is the weight error under gram + variance·I. At least 0.1 % of the mean
            diagonal is added to keep the factorization stable.

    Raises ValueError when `gram` holds NaN or infinite values.
    """

    def __init__(self, gram: torch.Tensor, ridge: float) -> None:
        diagonal = gram.diagonal()
        self._order = torch.argsort(diagonal, descending=True, stable=True)
        diagonal.add_(max(ridge, 1e-3 * float(diagonal.mean()), 1e-12))
        self._inverse = _inverse_factor(gram[self._order][:, self._order])

    def round(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Float32 weight [out, in] in steps of scale [out]: int8 [out, in]."""
        width = weight.shape[1]
        inverse = self._inverse
        # Rows are input channels, so that updates are contiguous, in units of each output channel's scale.
        work = (weight / scale[:, None])[:, self._order].t().contiguous()
        quantized = torch.empty(work.shape, dtype=torch.int8, device=weight.device)
        for start in range(0, width, _BLOCK):
            end = min(start + _BLOCK, width)
            block, factor = work[start:end], inverse[start:end, start:end]
            errors = torch.empty_like(block)
            pivots = factor.diagonal().tolist()
            with threads.single():
                for i, pivot in enumerate(pivots):
                    q = block[i].round().clamp_(QMIN, QMAX)
                    quantized[start + i] = q
                    error = torch.sub(block[i], q, out=errors[i]).div_(pivot)
                    if i + 1 < len(pivots):
                        block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
            if end < width:
                work[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(width, device=back.device)
        return quantized[back].t().contiguous()


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper U with Uᵀ U = gram⁻¹; more damping for as long as rounding makes `gram` indefinite.

    With rows and columns reversed, gram = L Lᵀ; reversed back L is an upper R with gram = R Rᵀ, and U = R⁻¹.

    Raises ValueError when `gram` holds NaN or infinite values.
    """
    damping = float(gram.diagonal().mean()) * 1e-3
    for _ in range(_DAMPINGS):
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not failed:
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        gram.diagonal().add_(damping)
        damping *= 4
    raise ValueError("the Gram matrix is not finite")
