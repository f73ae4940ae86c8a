"""Requests through real workers that die: nothing is lost, nothing comes twice, and little is held."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qtool import workers
from qtool.cli.printers import ToPipe
from qtool.console import Console
from qtool.errors import QtoolError, WorkerDied
from qtool.runtimes import window
from qtool.runtimes.lines import Chat
from qtool.runtimes.requests import read

# Answers each request with its prompt doubled, in blocks that it turns round. `die` are numbers of requests, counted
# over all lives (in a file), at which it is killed; `poison` is a prompt that kills it always.
MODULE = """
import os, signal
from pathlib import Path

def main(job, report):
    counter = Path(job["counter"])
    block, seen = [], int(counter.read_text())
    def out():
        for request in reversed(block):
            report.item({"index": request["index"], "text": request["prompt"] * 2})
        block.clear()
    while True:
        request = report.inputs.take(0.01)
        if request is None:
            out()
            if report.inputs.ended:
                return {"seen": seen}
            continue
        seen += 1
        if job["die"]:
            counter.write_text(str(seen))
        block.append(request)
        if seen in job["die"] or request["prompt"] == job["poison"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(block) == 7:
            out()
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "echo.py").write_text(MODULE)
    counter = tmp_path / "counter"
    counter.write_text("0")

    def make(die: tuple[int, ...] = (), poison: str | None = None) -> Callable[..., Any]:
        job = {"die": die, "poison": poison, "counter": str(counter)}
        env = {"PYTHONPATH": str(tmp_path)}
        return lambda inputs, on_event: workers.run("echo", job, inputs=inputs, on_event=on_event, env=env)

    return make


def requests(count: int) -> Iterator[dict[str, Any]]:
    return ({"index": i, "prompt": f"p{i}"} for i in range(count))


@pytest.mark.parametrize("die", [(), (1,), (500,), (300, 900, 1500, 1900)])
def test_every_request_is_answered_once_and_in_order(work: Callable[..., Any], die: tuple[int, ...]) -> None:
    answers: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    window.run(work(die), requests(2000), answers.append, events.append)
    assert [(a["index"], a["text"]) for a in answers] == [(i, f"p{i}p{i}") for i in range(2000)]
    assert sum(e["event"] == "warning" for e in events) == len(die)


def test_a_request_that_always_kills_is_the_end_but_keeps_what_came_before(work: Callable[..., Any]) -> None:
    answers: list[dict[str, Any]] = []
    with pytest.raises(WorkerDied, match="signal 9"):
        window.run(work(poison="p700"), requests(2000), answers.append, lambda event: None)
    assert [a["index"] for a in answers] == list(range(len(answers)))
    assert 690 <= len(answers) <= 700


def test_what_the_source_raises_comes_after_the_answers_before_it(work: Callable[..., Any]) -> None:
    def source() -> Iterator[dict[str, Any]]:
        yield from requests(10)
        raise QtoolError("the disk is gone")

    answers: list[dict[str, Any]] = []
    with pytest.raises(QtoolError, match="the disk is gone"):
        window.run(work(), source(), answers.append, lambda event: None)
    assert len(answers) == 10


def test_what_the_source_raises_is_not_lost_with_the_worker() -> None:
    """The first worker is told of it, and dies; the second one gets what that left, and is told as well."""

    def source() -> Iterator[dict[str, Any]]:
        yield from requests(10)
        raise QtoolError("the disk is gone")

    lives = iter(["dies", "lives"])

    def work(inputs: Iterator[dict[str, Any]], on_event: Callable[[workers.Event], None]) -> dict[str, Any]:
        asked = [next(inputs)["index"] for _ in range(10)]
        assert asked == list(range(10))
        with pytest.raises(QtoolError, match="the disk is gone") as caught:
            next(inputs)
        if next(lives) == "dies":
            raise WorkerDied("killed")
        for index in asked:
            on_event({"event": "item", "data": {"index": index}})
        raise caught.value

    answers: list[dict[str, Any]] = []
    with pytest.raises(QtoolError, match="the disk is gone"):
        window.run(work, source(), answers.append, lambda event: None)
    assert len(answers) == 10


def test_a_slow_source_is_not_waited_for(work: Callable[..., Any]) -> None:
    """The second request comes only once the first has been answered."""
    answered = threading.Event()

    def source() -> Iterator[dict[str, Any]]:
        yield {"index": 0, "prompt": "a"}
        assert answered.wait(60)
        yield {"index": 1, "prompt": "b"}

    answers: list[str] = []

    def on_answer(item: dict[str, Any]) -> None:
        answers.append(item["text"])
        answered.set()

    window.run(work(), source(), on_answer, lambda event: None)
    assert answers == ["aa", "bb"]


@pytest.mark.parametrize(("size", "most"), [(1, window.MOST_REQUESTS), (1 << 20, 16)])
def test_only_so_much_is_under_way(size: int, most: int) -> None:
    prompt = "x" * size
    read = itertools.count()
    opened = window.Window({"index": next(read), "prompt": prompt} for _ in itertools.repeat(None))
    taken = _taken(opened, most)
    opened.answer({"index": 1})
    assert list(opened.give_out()) == []  # 0 is missing
    assert not _grows(taken, most)
    opened.answer({"index": 0})
    assert [item["index"] for item in opened.give_out()] == [0, 1]
    assert _grows(taken, most)


def test_a_line_counts_with_all_its_fields(tmp_path: Path) -> None:
    """They are kept here for the answer, however little of them the worker gets."""
    file = tmp_path / "prompts.jsonl"
    row = json.dumps({"prompt": "x", "page": "y" * (1 << 20)}) + "\n"
    file.write_text(row * 40)
    lines = enumerate(read([f"@{file}"], Chat()))
    opened = window.Window(ToPipe(Console()).requests(lines))
    taken = _taken(opened, 16)
    assert not _grows(taken, 16)


def test_answers_that_wait_count() -> None:
    asked = threading.Semaphore(2)

    def source() -> Iterator[dict[str, Any]]:
        for request in requests(9):
            asked.acquire(timeout=60)
            yield request

    opened = window.Window(source())
    taken = _taken(opened, 2)
    opened.answer({"index": 1, "text": "y" * window.MOST_BYTES})
    asked.release(7)  # whoever is asking for one more gets it, and then no more
    assert not _grows(taken, 3)
    opened.answer({"index": 0})
    assert [item["index"] for item in opened.give_out()] == [0, 1]
    assert _grows(taken, 3)


def _taken(opened: window.Window, most: int) -> list[int]:
    """The requests that a worker has taken, so many for now; a thread goes on taking them."""
    taken: list[int] = []
    full = threading.Event()

    def take() -> None:
        for request in opened.requests():
            taken.append(request["index"])
            if len(taken) == most:
                full.set()

    threading.Thread(target=take, daemon=True).start()
    assert full.wait(60)
    return taken


def _grows(taken: list[int], size: int) -> bool:
    for _ in range(50):
        if len(taken) > size:
            return True
        threading.Event().wait(0.01)
    return False


def test_an_answer_is_told_as_it_grows_and_others_wait_for_their_turn() -> None:
    """The worker's pieces of three answers come mixed up; after its death the second one tells them again."""
    lives: Iterator[list[Any]] = iter(
        [
            [("piece", 0, "ab"), ("piece", 1, "x"), ("piece", 0, "c"), "die"],
            [("piece", 1, "xy"), ("piece", 0, "abcd"), ("item", 0), ("item", 2), ("piece", 1, "z"), ("item", 1)],
        ]
    )

    def work(inputs: Iterator[dict[str, Any]], on_event: Callable[[workers.Event], None]) -> dict[str, Any]:
        assert [next(inputs)["index"] for _ in range(3)] == [0, 1, 2]
        for step in next(lives):
            if isinstance(step, str):
                raise WorkerDied("killed")
            if step[0] == "piece":
                on_event({"event": "piece", "index": step[1], "text": step[2]})
            else:
                on_event({"event": "item", "data": {"index": step[1]}})
        return {}

    told: list[Any] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "piece":
            told.append((event["index"], event["text"]))

    window.run(work, requests(3), lambda item: told.append(item["index"]), on_event)
    assert told == [(0, "ab"), (0, "c"), (0, "d"), 0, (1, "xy"), (1, "z"), 1, 2]


def test_memory_does_not_grow_with_the_number_of_requests(work: Callable[..., Any]) -> None:
    """What this process holds at the end is no more than early on."""
    resident = []

    def on_answer(item: dict[str, Any]) -> None:
        if item["index"] % 10_000 == 9_999:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    window.run(work(), requests(50_000), on_answer, lambda event: None)
    assert len(resident) == 5
    assert resident[-1] - resident[0] < 4 << 20
