"""Where the float weights of a decoder layer come from, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn


class Weights(Protocol):
    """The float parameters of a decoder layer, by their names inside it."""

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        ...

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a linear's weight, float32 [stop - start, in]."""
        ...

    def vector(self, name: str) -> torch.Tensor | None:
        """A norm's gain, or any bias, float32, by its name; None when there is none, or it is a matrix."""
        ...


class ModuleWeights:
    """The parameters of a decoder layer that is in memory in float32."""

    def __init__(self, layer: nn.Module) -> None:
        self._parameters = dict(layer.named_parameters())

    def shape(self, linear: str) -> tuple[int, int]:
        out, width = self._parameters[f"{linear}.weight"].shape
        return out, width

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        return self._parameters[f"{linear}.weight"][start:stop].detach()

    def vector(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters.get(name)
        return None if parameter is None or parameter.dim() != 1 else parameter.detach()


class Rows(NamedTuple):
    """Rows `start` to `stop` (exclusive) of a linear."""

    linear: str
    start: int
    stop: int


def chunks(weights: Weights, linears: Sequence[str], elements: int, together: int = 1) -> Iterator[list[Rows]]:
    """All rows of these linears, which share a width, in lots of about so many elements.

    Args:
        together: every so many rows of a linear, from its first on, are in one lot.
    """
    chunk: list[Rows] = []
    room = capacity = max(1, elements // weights.shape(linears[0])[1], together)
    for name in linears:
        count, start = weights.shape(name)[0], 0
        while start < count:
            stop = min(count, start + room)
            if stop < count:
                stop -= (stop - start) % together
            fits = stop > start
            if fits:
                chunk.append(Rows(name, start, stop))
                room -= stop - start
                start = stop
            if not fits or not room:
                yield chunk
                chunk, room = [], capacity
    if chunk:
        yield chunk
