"""Who runs the units: this process, several on this machine, or those of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from qtool.engines.native.units import Piece

Unit = Callable[[Any], Iterator[Piece]]


class Executor(Protocol):
    """Runs units.

    Attributes:
        ahead: how many to have under way before waiting for the first.
    """

    ahead: int

    def submit(self, unit: Unit, task: Any) -> Callable[[], Iterable[Piece]]:
        """Begin a unit; calling what this returns waits for its pieces."""
        ...


class Here:
    """This process, one unit after the other, its pieces as they come."""

    ahead = 0

    def submit(self, unit: Unit, task: Any) -> Callable[[], Iterable[Piece]]:
        return lambda: unit(task)
