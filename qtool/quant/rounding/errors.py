"""What an error of the weights does to the output."""

from __future__ import annotations

from typing import Protocol

import torch


class RowError(Protocol):
    """Maps a weight error [rows, in] to each row's squared output error [rows]."""

    def __call__(self, delta: torch.Tensor) -> torch.Tensor: ...

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        """A lower bound of it that costs less."""
        ...

    def columns(self, block: slice) -> RowError:
        """The same for an error in these input channels alone."""
        ...


class ErrorOnTokens:
    """The error on given inputs x [tokens, in]; that on a few of them is the bound."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x, self._few = x, x[: max(1, len(x) // 8)]

    def __call__(self, delta: torch.Tensor) -> torch.Tensor:
        return (self._x @ delta.t()).square_().sum(dim=0)

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        return (self._few @ delta.t()).square_().sum(dim=0)

    def columns(self, block: slice) -> ErrorOnTokens:
        return ErrorOnTokens(self._x[:, block])


class ErrorByEnergy:
    """The expected error when input channels are uncorrelated, from their mean squares [in]."""

    def __init__(self, energy: torch.Tensor) -> None:
        self._energy = energy

    def __call__(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.square() @ self._energy

    def at_least(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.new_zeros(len(delta))  # the error itself is as cheap as any bound

    def columns(self, block: slice) -> ErrorByEnergy:
        return ErrorByEnergy(self._energy[block])
