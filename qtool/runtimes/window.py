"""Requests go into a worker, answers come out of it in order, and only what is under way is held.

A `Window` stands between the two: it holds what has been asked and not yet been answered in order, lets no more in than
it has room for, and so can give a second worker what a first one died over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from qtool import workers
from qtool.errors import WorkerDied

MOST_REQUESTS = 4096  # many more than a runtime works on together, so that one long answer doesn't stop the rest
MOST_BYTES = 16 << 20

Item = dict[str, Any]


class Window:
    """Requests under way, and answers that wait for those before them.

    Args:
        source: requests for the worker, each with its `index`, ascending; or, to stop the one with this index, `abort`.
            `size` says how many bytes it came in, if whoever asks keeps all of them until the answer.
    """

    def __init__(self, source: Iterator[dict[str, Any]]) -> None:
        self._source = source
        self._reading = threading.Lock()
        self._state = threading.Condition()
        self._order: dict[int, int] = {}  # index -> bytes, its answer's too, of everything not yet given out, in order
        self._asked: dict[int, dict[str, Any]] = {}
        self._answered: dict[int, Item] = {}
        self._bytes = 0
        self._last = -1  # index of the last request read
        self._life = 0
        self._failure: BaseException | None = None  # of the source, which says it once: asked again, it just ends

    def requests(self) -> Iterator[dict[str, Any]]:
        """For one worker: what an earlier one has left unanswered, then what is new. Ends when another one begins.

        Raises:
            Exception: what the source has raised, in the life of this worker or of an earlier one.
        """
        with self._state:
            self._life += 1
            self._state.notify_all()
            life, last = self._life, self._last
            left = list(self._asked.values())
        yield from left
        while read := self._read(life, last):
            yield from read
            last = max(last, read[-1]["index"])

    def _read(self, life: int, last: int) -> list[dict[str, Any]]:
        """What comes after the request `last`; nothing when there is no more, or another worker's turn has come."""
        with self._state:
            self._state.wait_for(lambda: life != self._life or self._room())
        with self._reading:
            if life != self._life:
                return []
            if self._last > last:  # an earlier worker's thread was still reading when that one died
                with self._state:
                    return [request for index, request in self._asked.items() if index > last]
            if (request := self._next()) is None:
                return []
            if request.get("abort"):
                return [request]
            with self._state:
                self._last = request["index"]
                self._order[self._last] = size = _size(request)
                self._bytes += size
                self._asked[self._last] = request
            return [request]

    def _next(self) -> dict[str, Any] | None:
        if self._failure is not None:
            raise self._failure
        try:
            return next(self._source, None)
        except BaseException as failure:
            self._failure = failure
            raise

    def _room(self) -> bool:
        return not self._order or (len(self._order) < MOST_REQUESTS and self._bytes < MOST_BYTES)

    def answer(self, item: Item) -> None:
        """The worker's answer to one request."""
        with self._state:
            if self._asked.pop(index := item["index"], None) is not None:
                self._answered[index] = item
                size = len(repr(item))
                self._order[index] += size
                self._bytes += size

    def give_out(self) -> Iterator[Item]:
        """The answers before which none is missing, in order, once each."""
        while True:
            with self._state:
                first = next(iter(self._order), None)
                if first is None or first not in self._answered:
                    return
                item = self._answered.pop(first)
                self._bytes -= self._order.pop(first)
                self._state.notify_all()
            yield item

    @property
    def first(self) -> int | None:
        """The request whose answer is to be given out next, if any is under way."""
        with self._state:
            return next(iter(self._order), None)


def _size(request: dict[str, Any]) -> int:
    """About how many bytes it takes; texts and conversations are what can be large."""
    return int(request.get("size") or len(str(request.get("prompt") or request.get("messages") or "")))


def run(
    work: Callable[[Iterator[dict[str, Any]], Callable[[workers.Event], None]], dict[str, Any]],
    source: Iterator[dict[str, Any]],
    on_answer: Callable[[Item], None],
    on_event: Callable[[workers.Event], None],
) -> dict[str, Any]:
    """Have a worker answer every request of `source`, giving the answers to `on_answer` in their order.

    A worker that dies is replaced, and its successor gets what it left. One that dies as well, without an answer given
    out in between, is the end.

    Args:
        work: runs one worker on an iterator of requests and returns its result.

    Raises:
        WorkerDied: twice in a row. And whatever `work`, `source` and `on_answer` raise.
    """
    window = Window(source)
    outlet = _Outlet(window, on_answer, on_event)
    while True:
        try:
            result = work(window.requests(), outlet.event)
        except WorkerDied as error:
            if not outlet.progress:
                raise
            outlet.begin_anew()
            on_event({"event": "warning", "message": f"{error.what}; another worker continues where it stopped"})
            continue
        outlet.give_out()
        return result


class _Outlet:
    """Where a worker's events go: answers in their order, and each new piece of the first that is not finished.

    Attributes:
        progress: an answer has been given out since the last worker died.
    """

    def __init__(
        self, window: Window, on_answer: Callable[[Item], None], on_event: Callable[[workers.Event], None]
    ) -> None:
        self._window, self._on_answer, self._on_event = window, on_answer, on_event
        self._texts: dict[int, str] = {}  # what this worker has written of answers that are not finished
        self._told = 0  # how much of the first of them has been told
        self.progress = True

    def begin_anew(self) -> None:
        """Another worker writes the unfinished answers again; what has been told of them stays told."""
        self._texts.clear()
        self.progress = False

    def event(self, event: workers.Event) -> None:
        texts = self._texts
        if event["event"] == "item":
            self._window.answer(event["data"])
        elif event["event"] == "piece":
            texts[event["index"]] = texts.get(event["index"], "") + event["text"]
        else:
            self._on_event(event)
        self.give_out()
        first = self._window.first
        if first is not None and len(text := texts.get(first, "")) > self._told:
            self._on_event({"event": "piece", "index": first, "text": text[self._told :]})
            self._told = len(text)

    def give_out(self) -> None:
        """Answers before which none is missing."""
        for item in self._window.give_out():
            self._on_answer(item)
            self._texts.pop(item["index"], None)
            self._told, self.progress = 0, True
