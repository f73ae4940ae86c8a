"""The scales of a weight: how much of its range is worth a step's width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qtool.quant.integer import asymmetric_parameters, symmetric_scale, widened
from qtool.quant.rounding.errors import ErrorInGroups, RowError, ScaleError
from qtool.quant.rounding.nearest import round_to_nearest
from qtool.scheme import QuantizationArgs


class Scales(NamedTuple):
    """Of a weight [out, in].

    Attributes:
        scale: float32 [out], or [out, groups]; negative where that errs less, if the search is signed.
        bound: float32 of the same shape: values are limited to ± bound before they are rounded. With zero points the
            range of the integers limits them, and this says nothing.
        zero_point: float32 of the same shape, whole numbers; None where all are 0.
    """

    scale: torch.Tensor
    bound: torch.Tensor
    zero_point: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Scales:
        """Of what a function makes of each."""
        zero_point = None if self.zero_point is None else function(self.zero_point)
        return Scales(function(self.scale), function(self.bound), zero_point)


@dataclass(frozen=True)
class ScaleSearch:
    """Finds for each scale the clipping ratio with the least error, the first of a tie.

    Attributes:
        args: of the weight.
        ratios: fractions of the largest magnitude to try, the widest first.
        error: what to minimise; not looked at where there is only one ratio.
        storable: rounds scales to what the checkpoint format keeps of them.
        signed: rows and groups of a symmetric weight may have a negative scale. Then the ratio at which the largest
            weight is the least integer is tried, too.
    """

    args: QuantizationArgs
    ratios: Sequence[float]
    error: RowError | None
    storable: Callable[[torch.Tensor], torch.Tensor]
    signed: bool = False

    def of_rows(self, weight: torch.Tensor) -> Scales:
        """Scales of some rows of a weight, float32 [rows, in], each row or each group of its channels by itself.

        Where blocks share a scale, the rows are those of one weight, from the first of a block on; all rows of a block
        get its scale.
        """
        if self.args.block_structure is not None:
            return self._of_blocks(weight)
        of_each = self._of_each
        if not self.args.symmetric:
            of_each = self._with_zero_points
        elif self.signed and self.error is not None:
            of_each = self._of_both_signs
        if self.args.strategy != "group":
            return of_each(weight, self.error)
        blocks = column_blocks(self.args, weight.shape[1])
        error = None if self.error is None else ErrorInGroups(self.error, blocks)
        found = of_each(weight.reshape(-1, weight.shape[1] // len(blocks)), error)
        return found.map(lambda each: each.view(len(weight), len(blocks)))

    def of_tensor(self, parts: Callable[[], Iterable[torch.Tensor]]) -> Scales:
        """The one scale of a whole weight, [1].

        Args:
            parts: gives the weight some rows at a time, float32 [rows, in], as often as it is called.
        """
        peak = torch.stack([part.abs().amax() for part in parts()]).amax()[None]
        bounds = torch.cat([peak * ratio for ratio in self.ratios])
        scales = self.storable(symmetric_scale(bounds, self.args))
        errors = torch.zeros_like(widened(bounds))
        if len(bounds) > 1 and self.error is not None:
            for part in parts():
                every = torch.arange(len(part), device=part.device)
                for i in range(len(bounds)):
                    scale, bound = (each[i].expand(len(part)) for each in (scales, bounds))
                    q = round_to_nearest(part, scale, bound, self.args)
                    errors[i] += self.error(q.mul_(scale[:, None]).sub_(part), every).sum()
        best = errors.argmin()[None]
        return Scales(scales.index_select(0, best), bounds.index_select(0, best))

    def _of_blocks(self, weight: torch.Tensor) -> Scales:
        """[rows, blocks of columns], without a search: what floating point loses hardly depends on the scale."""
        rows, columns = self.args.rows, self.args.columns
        assert columns is not None
        count, width = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -width % columns, 0, -count % rows))
        peak = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax(dim=(1, 3))
        scale = self.storable(symmetric_scale(peak, self.args))
        return Scales(scale, peak).map(lambda each: each.repeat_interleave(rows, dim=0)[:count])

    def _of_each(self, weight: torch.Tensor, row_error: ScaleError | None) -> Scales:
        """A scale and bound for each row [rows] of a weight or of parts of it, float32 [rows, some]."""
        found, _ = self._positive(weight, self.ratios, row_error)
        return found

    def _of_both_signs(self, weight: torch.Tensor, row_error: ScaleError | None) -> Scales:
        """The same, where integers may stand for the weight or for its negative."""
        full = self.args.steps / (2 * -self.args.qmin)
        ratios = sorted({*self.ratios, full}, reverse=True)
        (found, error), (turned, its) = (self._positive(each, ratios, row_error) for each in (weight, -weight))
        better = its < error
        return Scales(torch.where(better, -turned.scale, found.scale), torch.where(better, turned.bound, found.bound))

    def _positive(
        self, weight: torch.Tensor, ratios: Sequence[float], row_error: ScaleError | None
    ) -> tuple[Scales, torch.Tensor]:
        """Positive scales, and the error [rows] with them; infinite where none was looked at."""
        peak = weight.abs().amax(dim=1)
        bound = peak * ratios[0]
        scale = self.storable(symmetric_scale(bound, self.args))
        least = torch.full_like(peak, float("inf"))
        if len(ratios) == 1 or row_error is None:
            return Scales(scale, bound), least
        for ratio in ratios:
            narrower = peak * ratio
            step = self.storable(symmetric_scale(narrower, self.args))
            delta = round_to_nearest(weight, step, narrower, self.args).mul_(step[:, None]).sub_(weight)
            if weight.device.type != "cpu":  # it is faster at all rows than at finding out which ones matter
                every = torch.arange(len(delta), device=delta.device)
                error = row_error(delta, every)
                better = error < least
                least, scale, bound = (
                    torch.where(better, new, old) for new, old in ((error, least), (step, scale), (narrower, bound))
                )
                continue
            rows = (row_error.at_least(delta) < least).nonzero()[:, 0]
            error = row_error(delta, rows)
            rows = rows[better := error < least[rows]]
            least[rows] = error[better]
            scale[rows] = step[rows]
            bound[rows] = narrower[rows]
        return Scales(scale, bound), least

    def _with_zero_points(self, weight: torch.Tensor, row_error: ScaleError | None) -> Scales:
        """The same with a zero point each: integers span the least number to the largest, or a part of that."""
        args = self.args
        low, high = torch.aminmax(weight, dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale, bound, zero_point = self._between(low * self.ratios[0], high * self.ratios[0])
        if len(self.ratios) == 1 or row_error is None:
            return Scales(scale, bound, zero_point)
        least = torch.full_like(low, float("inf"))
        every = torch.arange(len(weight), device=weight.device)
        for ratio in self.ratios:
            step, limit, zero = tried = self._between(low * ratio, high * ratio)
            q = round_to_nearest(weight, step, limit, args, zero)
            delta = q.sub_(zero[:, None]).mul_(step[:, None]).sub_(weight)
            error = row_error(delta, every)
            better = error < least
            least = torch.where(better, error, least)
            scale, bound, zero_point = (
                torch.where(better, new, old) for new, old in zip(tried, (scale, bound, zero_point), strict=True)
            )
        return Scales(scale, bound, zero_point)

    def _between(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scale, bound and zero point of ranges [low, high] that hold 0; the latter is that of the stored scale."""
        scale = self.storable(asymmetric_parameters(low, high, self.args)[0])
        zero_point = torch.round(self.args.qmin - low / scale).clamp_(self.args.qmin, self.args.qmax)
        return scale, torch.maximum(-low, high), zero_point


def column_blocks(args: QuantizationArgs, width: int) -> list[slice]:
    """The input channels of a row that share a scale."""
    size = args.columns or width
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]
