"""How far a mean over a few windows of text can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

if TYPE_CHECKING:
    import torch

# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom; beyond, 1.96 + 2.4 / n is right to three digits.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


_RESAMPLES = 500


class Estimate(TypedDict):
    """A figure and its 95 % confidence interval; no interval (None) from one window alone."""

    value: float
    low: float | None
    high: float | None


def estimate(windows: Sequence[float], transform: Callable[[float], float] | None = None) -> Estimate:
    """The mean of one figure per window, with Student's interval; `transform` (increasing) is applied to all three."""
    shown = transform or float
    mean = math.fsum(windows) / len(windows)
    if len(windows) == 1:
        return {"value": shown(mean), "low": None, "high": None}
    margin = _t(len(windows) - 1) * statistics.stdev(windows) / math.sqrt(len(windows))
    return {"value": shown(mean), "low": shown(mean - margin), "high": shown(mean + margin)}


def estimate_share(share: float, count: int) -> Estimate:
    """How many of `count` documents, with Wilson's interval, which stays within 0 and 1 and is none of a point."""
    z = statistics.NormalDist().inv_cdf(0.975)
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    margin = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / scale
    return {"value": share, "low": max(0.0, centre - margin), "high": min(1.0, centre + margin)}


def estimate_quantile(tokens: torch.Tensor, q: float) -> Estimate:
    """A quantile over all tokens of a non-negative figure, with an interval from resampled windows.

    Tokens of a window resemble each other, so whole windows are drawn. Student's interval on the logarithm, with the
    resamples' standard deviation, holds what it promises from few windows better than the resamples' own quantiles
    do: on simulated windows of correlated log-normal tokens 91 % of the intervals held the true 99th percentile
    (78 % of the plain ones from 6 windows, 89 % from 24), and 93 to 96 % the true median.

    Args:
        tokens: float [windows, tokens].
        q: 0 to 1.
    """
    import torch

    count = len(tokens)
    value = float(tokens.flatten().quantile(q))
    if count == 1:
        return {"value": value, "low": None, "high": None}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (_RESAMPLES, count), generator=generator)
    resampled = torch.stack([tokens[rows].flatten().quantile(q) for rows in drawn])
    tiny = torch.finfo(resampled.dtype).tiny
    spread = float(resampled.clamp(min=tiny).log().std()) * math.sqrt(count / (count - 1))
    factor = math.exp(min(_t(count - 1) * spread, 700))
    return {"value": value, "low": value / factor, "high": value * factor}


def _t(freedom: int) -> float:
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
