"""A scale for each input channel of a group: x / s with W · s computes the same, and rounds better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group
from qtool.quant.weights import Weights
from qtool.recipe.policy import Policy

_FLOOR = 1e-5


@dataclass(frozen=True)
class Diagonal:
    """A smoothing scale and how it was found.

    Attributes:
        s: float32 [in].
        alpha: the exponent behind it; None for methods without one.
        error: the loss that it minimises; comparable within one search only.
    """

    s: torch.Tensor
    alpha: float | None
    error: float = float("nan")


class GroupTransform(Protocol):
    """Finds a diagonal for a group whose producer can take its inverse up.

    Attributes:
        needs_hessian: of its statistics; all else is there anyway.
    """

    needs_hessian: ClassVar[bool]

    def __init__(self, policy: Policy) -> None: ...

    def fit(self, weights: Weights, group: Group, statistics: InputStatistics) -> Diagonal | None:
        """The diagonal of one group, if any does good.

        Args:
            weights: of the decoder layer, untouched.
            group: with a producer to fold into; channels that share a channel of it must share one s.
            statistics: of the group's input.
        """
        ...


def smoothing_scale(act_max: torch.Tensor, w_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = act_max^alpha / w_max^(1-alpha), at least 1e-5; 1 where either maximum is 0. All float32 [in].

    SmoothQuant's (Xiao et al., arXiv 2211.10438, equation 4); OSL tries several exponents of it.
    """
    s = (act_max.pow(alpha) / w_max.pow(1 - alpha)).clamp_(min=_FLOOR)
    return s.masked_fill_((act_max == 0) | (w_max == 0), 1)
