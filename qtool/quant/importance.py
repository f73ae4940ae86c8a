"""How much an error in a linear's output matters to what the model says.

Up to second order the KL divergence that an error e [tokens, out] of an output causes is ½ Σ (g·e)², with g the
gradient of log p, of tokens drawn from the model, by that output (Fisher information). With independent errors each
one's square counts g² times. That matrix [tokens, out] is kept as a product of one factor per token and one per row:
the sums of g² over the other side. (GuidedQuant, arXiv 2505.07004, weighs the Hessians of some rows likewise.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FLOOR = 0.1  # of the mean, that all tokens and rows have: gradients of one drawing are a noisy estimate


@dataclass(frozen=True)
class Importance:
    """Of the outputs of linears that share their input.

    Attributes:
        tokens: float32 [tokens], of the calibration text in its order.
        rows: float32 [rows], of all the linears' rows, one linear after the other.
    """

    tokens: torch.Tensor
    rows: torch.Tensor

    def weights(self) -> Importance:
        """The same with a mean of 1 of both, made from sums of g²."""
        return Importance(_weights(self.tokens), _weights(self.rows))


def _weights(squares: torch.Tensor) -> torch.Tensor:
    mean = squares.mean()
    if not bool(mean > 0) or not bool(mean.isfinite()):
        return torch.ones_like(squares)
    return (squares / mean).mul_(1 - _FLOOR).add_(_FLOOR)
