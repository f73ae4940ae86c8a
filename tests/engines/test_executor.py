"""Units run anywhere and give the same; one whose process is killed is begun again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qtool.engines.job import Resources
from qtool.engines.native import executor
from qtool.engines.native.pieces import Output, Piece
from qtool.errors import InputError, QtoolError

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Setup:
    """A context that is a number."""

    factor: int

    def open(self, card: int | None = None) -> int:
        return self.factor


def make(workers: int) -> AbstractContextManager[executor.Executor]:
    return executor.make(Resources(workers=workers), 2, Setup(2))


def double(factor: int, task: torch.Tensor) -> Iterator[Piece]:
    for row in task:
        yield Output(row * factor)


def where(_factor: int, _task: None) -> Iterator[Piece]:
    yield Output(torch.tensor(os.getpid()))


def refuse(_factor: int, task: str) -> Iterator[Piece]:
    yield Output(torch.ones(1))
    raise InputError("tensor a holds NaN", where=task, hint="repair it")


def die_once(_factor: int, task: tuple[str, int]) -> Iterator[Piece]:
    """Kills its process the first time."""
    folder, number = task
    mark = Path(folder) / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield Output(torch.tensor(number))


def die(_factor: int, _task: None) -> Iterator[Piece]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Output(torch.ones(1))


def test_this_process_hands_out_pieces_as_they_come() -> None:
    with make(0) as units:
        pieces = iter(units.submit(refuse, "file")())
        assert torch.equal(next(pieces).tensor, torch.ones(1))  # type: ignore[union-attr]
        with pytest.raises(InputError):
            next(pieces)


def test_processes() -> None:
    with make(2) as units:
        tasks = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
        waiting = [units.submit(double, task) for task in tasks]
        for task, wait in zip(tasks, waiting, strict=True):
            found = torch.stack([piece.tensor for piece in wait()])  # type: ignore[union-attr]
            assert torch.equal(found, task * 2)
        (piece,) = units.submit(where, None)()
        assert int(piece.tensor) != os.getpid()  # type: ignore[union-attr]
        with pytest.raises(InputError, match="holds NaN") as error:
            units.submit(refuse, "file")()
        assert (error.value.where, error.value.hint) == ("file", "repair it")


def test_killed_processes_lose_nothing(tmp_path: Path) -> None:
    with make(2) as units:
        waiting = [units.submit(die_once, (str(tmp_path), number)) for number in range(2)]
        assert [int(piece.tensor) for wait in waiting for piece in wait()] == [0, 1]  # type: ignore[union-attr]
        (piece,) = units.submit(double, torch.ones(1, 2))()
        assert torch.equal(piece.tensor, torch.full((2,), 2.0))  # type: ignore[union-attr]


def test_a_unit_that_always_kills_its_process_is_an_error() -> None:
    with make(1) as units, pytest.raises(QtoolError, match="killed 3 times"):
        units.submit(die, None)()


def test_both_is_refused() -> None:
    with pytest.raises(InputError, match="exclude"), executor.make(Resources(workers=1, ray="local"), 2, Setup(2)):
        pass
