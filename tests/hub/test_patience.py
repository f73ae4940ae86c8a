"""Trying again: bounded, with growing waits, and only as long as nothing comes."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from qtool.errors import QtoolError
from qtool.hub.patience import Again, Patience, Stopped

QUICK = Patience(tries=4, base=0.001, cap=0.01)


class Flaky:
    """Fails as often as told, counting; each call may bring something."""

    def __init__(self, failures: int, error: Exception | None = None, brings: int = 0) -> None:
        self.calls, self.have = 0, 0
        self.failures, self.error, self.brings = failures, error or Again("broken"), brings

    def __call__(self) -> str:
        self.calls += 1
        self.have += self.brings
        if self.calls <= self.failures:
            raise self.error
        return "done"


def test_a_failure_that_passes() -> None:
    flaky = Flaky(3)
    assert QUICK.persist(flaky, where="x") == "done"
    assert flaky.calls == 4


def test_waits_that_somebody_may_wonder_about_are_told() -> None:
    said: list[str] = []

    def broken() -> None:
        raise Again("broken", after=1.0)

    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return False

    with pytest.raises(QtoolError) as caught:
        Patience(tries=3, say=said.append, hint="look").persist(broken, where="hub", stop=Never())
    assert caught.value.hint == "look"
    assert [line.partition(";")[0] for line in said] == ["hub: broken"] * 2
    assert "(2 of 3 failed)" in said[1]


def test_given_up_after_so_many_tries() -> None:
    flaky = Flaky(100)
    with pytest.raises(QtoolError, match="broken; given up after 4 tries") as caught:
        QUICK.persist(flaky, where="file")
    assert (flaky.calls, caught.value.where) == (4, "file")


def test_what_is_not_worth_it_is_not_tried_again() -> None:
    flaky = Flaky(100, QtoolError("forbidden"))
    with pytest.raises(QtoolError, match="forbidden"):
        QUICK.persist(flaky, where="x")
    assert flaky.calls == 1


def test_progress_makes_up_for_failures_but_only_new_progress() -> None:
    flaky = Flaky(20, brings=1)
    assert QUICK.persist(flaky, where="x", progress=lambda: flaky.have) == "done"
    assert flaky.calls == 21

    flaky = Flaky(100)
    heights = itertools.cycle([0, 5])
    with pytest.raises(QtoolError):  # up and down between the same two marks is no progress
        QUICK.persist(flaky, where="x", progress=lambda: next(heights))
    assert flaky.calls == QUICK.tries


def test_waits_grow_and_are_not_the_same_twice() -> None:
    patience, times = Patience(tries=4, base=0.02), []

    def action() -> None:
        times.append(time.monotonic())
        raise Again("x")

    for _ in range(2):
        with pytest.raises(QtoolError):
            patience.persist(action, where="x")
    first, second = ([b - a for a, b in itertools.pairwise(run)] for run in (times[:4], times[4:]))
    for waits in (first, second):
        assert all(wait >= 0.02 * 2**n / 2 for n, wait in enumerate(waits, start=1))
    assert first != second


def test_a_server_that_asks_for_too_much_is_not_waited_for() -> None:
    flaky = Flaky(100, Again("busy", after=1e6))
    with pytest.raises(QtoolError):
        Patience().persist(flaky, where="x")
    assert flaky.calls == 1


def test_stop_ends_a_wait() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Patience(base=1000, cap=1000).persist(Flaky(1), where="x", stop=stop)
