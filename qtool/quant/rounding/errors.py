"""What an error of the weights does to the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class ScaleError(Protocol):
    """Maps an error [rows, in] of what shares a scale to some rows' squared output errors."""

    def __call__(self, delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Of the rows of these numbers, int64 [n]: float32 [n]."""
        ...

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        """A lower bound of it for all rows [rows] that costs less."""
        ...


class RowError(ScaleError, Protocol):
    """That of whole rows of a weight, which can also be asked for some of the channels."""

    def columns(self, block: slice) -> RowError:
        """The same for an error in these input channels alone."""
        ...


class ErrorOnTokens:
    """The error on given inputs x [tokens, in]; that on a few of them is the bound."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x, self._few = x, x[: max(1, len(x) // 8)]

    def __call__(self, delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (self._x @ _some(delta, rows).t()).square_().sum(dim=0)

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        return (self._few @ delta.t()).square_().sum(dim=0)

    def columns(self, block: slice) -> ErrorOnTokens:
        return ErrorOnTokens(self._x[:, block])


class ErrorByEnergy:
    """The expected error when input channels are uncorrelated, from their mean squares [in]."""

    def __init__(self, energy: torch.Tensor) -> None:
        self._energy = energy

    def __call__(self, delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return _some(delta, rows).square() @ self._energy

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.new_zeros(len(delta))  # the error itself is as cheap as any bound

    def columns(self, block: slice) -> ErrorByEnergy:
        return ErrorByEnergy(self._energy[block])


class ErrorInGroups:
    """The errors of each row's groups of input channels by themselves, a row of `delta` for each group of each.

    Args:
        error: of whole rows.
        blocks: the channels of each group, all of a size.
    """

    def __init__(self, error: RowError, blocks: Sequence[slice]) -> None:
        self._errors = [error.columns(block) for block in blocks]

    def __call__(self, delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        count = len(self._errors)
        every = torch.arange(len(delta) // count, device=delta.device)
        found = [error(delta[group::count], every) for group, error in enumerate(self._errors)]
        return torch.stack(found, dim=1).flatten()[rows]

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        count = len(self._errors)
        found = [error.at_least(delta[group::count]) for group, error in enumerate(self._errors)]
        return torch.stack(found, dim=1).flatten()


def _some(delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return delta if len(rows) == len(delta) else delta[rows]
