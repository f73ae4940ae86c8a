"""How far a mean over a few windows of text can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypedDict

# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom; beyond, 1.96 + 2.4 / n is right to three digits.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


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
    freedom = len(windows) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
    margin = t * statistics.stdev(windows) / math.sqrt(len(windows))
    return {"value": shown(mean), "low": shown(mean - margin), "high": shown(mean + margin)}
