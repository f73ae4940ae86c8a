"""What is told of a quantized group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qtool.quant.transforms import Diagonal
from qtool.recipe.policy import Policy


@dataclass
class GroupReport:
    """How one group of linears came out; goes into qtool.json.

    Attributes:
        input, smoothed: the input's range on the calibration text before and after smoothing, as "low", "high" and
            "typical", the median over channels of the largest magnitude.
        static_cost: expected squared error with static activations over that with a scale per token, where there was a
            choice.
    """

    linears: list[str]
    activations: str
    smoothing: str
    alpha: float | None
    relative_error: float
    input: dict[str, float]
    smoothed: dict[str, float]
    static_cost: float | None = None


def report(
    members: list[str],
    policy: Policy,
    chosen: Diagonal | None,
    relative_error: float,
    before: dict[str, float],
    after: dict[str, float],
) -> GroupReport:
    """How a group came out; `before` and `after` are the extents of its input without smoothing and with it."""
    return GroupReport(
        linears=members,
        activations=policy.activations.mode,
        smoothing=policy.smoothing.method if chosen is not None else "none",
        alpha=chosen.alpha if chosen is not None else None,
        relative_error=relative_error,
        input=before,
        smoothed=after,
    )


def extremes(low: torch.Tensor, high: torch.Tensor) -> list[torch.Tensor]:
    """Per-channel extremes [in] in three numbers []: the lowest, the highest, the median of the largest magnitudes."""
    return [low.min(), high.max(), torch.maximum(low.abs(), high.abs()).median()]


def extent(found: Sequence[float]) -> dict[str, float]:
    """The same three for a report."""
    return dict(zip(("low", "high", "typical"), found, strict=True))
