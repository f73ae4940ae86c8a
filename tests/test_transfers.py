"""Work that goes on behind its caller, or ahead of it, and copies that arrive when they are waited for."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from qtool.transfers import Behind, Download, ahead
from tests.engines.accelerator import Accelerator


@pytest.mark.parametrize("threads", [0, 1])
def test_work_behind_is_done_in_order(threads: int) -> None:
    done: list[int] = []
    with Behind(threads=threads) as behind:
        for i in range(20):
            behind.do(partial(done.append, i))
        behind.wait()
        assert done == [*range(20)]
        behind.do(partial(done.append, 20))
    assert done == [*range(21)]


def test_no_more_waits_than_memory_has_room_for() -> None:
    go_on, done = threading.Event(), list[int]()
    with Behind(threads=1) as behind:

        def wait() -> None:
            go_on.wait()

        def give() -> None:
            for i in range(9):
                behind.do(partial(done.append, i), nbytes=1 << 28)

        behind.do(wait)
        caller = threading.Thread(target=give)
        caller.start()
        caller.join(0.2)
        assert caller.is_alive()
        go_on.set()
        caller.join()
    assert done == [*range(9)]


def test_what_is_larger_than_the_room_waits_alone() -> None:
    done: list[int] = []
    with Behind(threads=1) as behind:
        for i in range(3):
            behind.do(partial(done.append, i), nbytes=1 << 40)
            assert done[:i] == [*range(i)]
    assert done == [0, 1, 2]


def test_several_threads_behind() -> None:
    """Each waits for the others: one thread alone would wait for ever."""
    all_there, done = threading.Barrier(3, timeout=60), list[int]()

    def work(i: int) -> None:
        all_there.wait()
        done.append(i)

    with Behind(threads=3) as behind:
        for i in range(3):
            behind.do(partial(work, i))
    assert sorted(done) == [0, 1, 2]


@pytest.mark.parametrize("threads", [0, 1])
def test_nothing_is_done_after_a_failure(threads: int) -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("the disk is full")

    def all_of_it() -> None:
        with Behind(threads=threads) as behind:
            behind.do(fail)
            behind.do(partial(done.append, 1))
            behind.do(partial(done.append, 2))

    with pytest.raises(OSError, match="full"):
        all_of_it()
    assert done == []


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead(threads: int) -> None:
    read: list[int] = []

    def double(place: int) -> int:
        read.append(place)
        return 2 * place

    found = ahead(double, range(5), threads=threads)
    assert next(found) == 0
    assert [*found] == [2, 4, 6, 8]
    assert sorted(read) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        [*ahead(lambda place: 1 // place, [1, 0], threads=threads)]


def test_downloads_are_there_when_they_are_waited_for() -> None:
    with Accelerator() as accelerator:
        there = torch.arange(6.0).to("cuda")
        download = Download([there, there[2:4] * 2])
        there.add_(1)
        assert accelerator.counts.waits.total() == 0
        first, second = download.result()
    assert first.device.type == second.device.type == "cpu"
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3, 4, 5], [4, 6])
    here = torch.ones(2)
    assert Download([here]).result()[0] is here
