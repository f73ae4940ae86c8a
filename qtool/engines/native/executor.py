"""Who runs the units: this process, several on this machine, or those of a Ray cluster.

Whoever it is computes the same, so a unit whose process is lost is simply begun again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from qtool.engines.job import Resources
from qtool.engines.native.pieces import Piece
from qtool.errors import InputError, QtoolError
from qtool.workers import end_with_parent

Unit = Callable[[Any, Any], Iterator[Piece]]
"""Takes the context of its process, and a task."""
Pending = Callable[[], Iterable[Piece]]
"""Waits for a unit's pieces."""

_TRIES = 3
_LOST = "the processes that run it were killed {} times, most likely because memory ran out"
_HINT = "use fewer --workers or a smaller --memory; what is finished is kept"


class Opener(Protocol):
    """How another process comes to its context. Equal ones come to the same."""

    def open(self, card: int | None = None) -> Any:
        """The context, on this card of several. Raises InputError."""
        ...


class Executor(Protocol):
    """Runs units.

    Attributes:
        ahead: how many to have under way before waiting for the first.
    """

    ahead: int

    def submit(self, unit: Unit, task: Any) -> Pending:
        """Begin a unit."""
        ...


def check(resources: Resources, cards: int = 1) -> None:
    """Raises InputError for more than one of workers, Ray and several cards, or when Ray isn't installed."""
    if cards > 1 and (resources.workers or resources.ray):
        raise InputError(
            "--devices runs a process on each card, and takes neither --workers nor --ray",
            where="command line",
            hint="give one of them",
        )
    if resources.workers and resources.ray:
        raise InputError("--workers and --ray exclude each other", where="command line", hint="give one of them")
    if resources.ray and importlib.util.find_spec("ray") is None:
        raise InputError("Ray is not installed where the native engine runs", where="--ray", hint="pip install ray")


@contextmanager
def make(resources: Resources, context: Any, setup: Opener, cards: int = 1) -> Iterator[Executor]:
    """The executor for these resources.

    Args:
        context: for units that run in this process.
        setup: how others come to theirs.
        cards: with several, a process on each runs the units.

    Raises InputError as `check`, and QtoolError when the cluster can't be reached.
    """
    check(resources, cards)
    if resources.ray:
        with _ray(resources.ray, setup) as executor:
            yield executor
    elif cards > 1:
        with Processes(cards, setup, cards=range(cards)) as executor:
            yield executor
    elif resources.workers:
        with Processes(resources.workers, setup) as executor:
            yield executor
    else:
        yield Here(context)


class Here:
    """This process, one unit after the other, its pieces as they come."""

    ahead = 0

    def __init__(self, context: Any) -> None:
        self._context = context

    def submit(self, unit: Unit, task: Any) -> Pending:
        return lambda: unit(self._context, task)


class Processes:
    """Processes on this machine, which end with this one.

    Args:
        cards: one for each process to compute on.
    """

    def __init__(self, count: int, setup: Opener, cards: Sequence[int] = ()) -> None:
        self.ahead = 2 * count
        self._count, self._setup, self._cards = count, setup, cards
        self._pool = self._new_pool()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, unit: Unit, task: Any) -> Pending:
        # Bytes, not tensors: what shares memory with a process that was killed can't be read any more.
        content = pickle.dumps((self._setup, unit, task))
        first = self._begin(content)

        def wait() -> Iterable[Piece]:
            begun = first
            for _ in range(_TRIES):
                pool, future = begun
                try:
                    pieces: list[Piece] = pickle.loads(future.result())
                    return pieces
                except BrokenProcessPool:
                    if pool is self._pool:
                        self._pool = self._new_pool()
                    begun = self._begin(content)
            raise QtoolError(_LOST.format(_TRIES), where=unit.__name__, hint=_HINT)

        return wait

    def _begin(self, content: bytes) -> tuple[ProcessPoolExecutor, Future[bytes]]:
        try:
            return self._pool, self._pool.submit(_run, content)
        except BrokenProcessPool:  # noticed only now
            self._pool = self._new_pool()
            return self._pool, self._pool.submit(_run, content)

    def _new_pool(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")
        cards = spawn.SimpleQueue()
        for card in self._cards:
            cards.put(card)
        return ProcessPoolExecutor(
            self._count, mp_context=spawn, initializer=_start, initargs=(os.getpid(), bool(self._cards), cards)
        )


@contextmanager
def _ray(address: str, setup: Opener) -> Iterator[Executor]:
    import ray

    root = Path(__file__).resolve().parents[3]
    try:
        with contextlib.chdir(root):  # Ray lets its workers import what lies in the current folder
            ray.init(
                address=None if address == "local" else address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": str(root)}},
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise QtoolError(f"no Ray cluster: {error}", where=address, hint="start one: ray start --head") from None
    try:
        yield Ray(ray, setup)
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()


class Ray:
    """The workers of a Ray cluster whose machines see the model under the same path and have the same qtool."""

    def __init__(self, ray: Any, setup: Opener) -> None:
        self._ray, self._setup = ray, setup
        self._remote = ray.remote(max_retries=_TRIES)(_run)
        self.ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def submit(self, unit: Unit, task: Any) -> Pending:
        reference = self._remote.remote(pickle.dumps((self._setup, unit, task)))

        def wait() -> Iterable[Piece]:
            try:
                pieces: list[Piece] = pickle.loads(self._ray.get(reference))
                return pieces
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self._ray.exceptions.RayError as error:
                raise QtoolError(f"lost on the Ray cluster: {error}", where=unit.__name__, hint=_HINT) from None

        return wait


_card: int | None = None  # that this process computes on, of several


def _start(parent: int, has_card: bool, cards: Any) -> None:
    """At the start of a process. Each takes one of the cards."""
    global _card
    end_with_parent(parent)
    if has_card:
        _card = cards.get()


def _run(content: bytes) -> bytes:
    """In the process that does the work."""
    setup, unit, task = pickle.loads(content)
    return pickle.dumps(list(unit(_opened(setup), task)))


@lru_cache(maxsize=1)
def _opened(setup: Opener) -> Any:
    """Once in a process. Raises QtoolError, since the job itself could open it before."""
    try:
        return setup.open(_card)
    except InputError as error:
        raise QtoolError(error.what, where=error.where, hint=error.hint) from error
