"""How much of a hub's answers is taken, and how slowly it may come.

A hub may mean harm, or something on the way may be broken: a listing without an end, 18 MB that unpack to 5 GB, a byte
every few seconds. What belongs to no file is small and quick; a file moves on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qtool.errors import InputError, QtoolError
from qtool.hub.patience import Again

MOST_BYTES = 64 << 20  # of one answer that is no file
MOST_SECONDS = 60.0  # that it may take to come
MOST_ANSWERS = 2000  # that one listing may take: modelers.cn has one for each folder
LISTING_SECONDS = 600.0  # for everything that a listing takes, waits for another try included

LEAST_BYTES = 10_000  # of a file
WINDOW_SECONDS = 60.0  # in so many seconds
_LOOK_SECONDS = 1.0


class Answer:
    """One answer that is no file, as it comes. Raises from `take`."""

    def __init__(self, host: str) -> None:
        self._host, self._taken, self._began = host, 0, time.monotonic()

    def take(self, count: int) -> None:
        """So many more bytes have come.

        Raises:
            InputError: too many. Again: too slowly.
        """
        self._taken += count
        if self._taken > MOST_BYTES:
            raise InputError(
                f"refused: an answer of more than {MOST_BYTES >> 20} MB that is not a file", where=self._host
            )
        if time.monotonic() - self._began > MOST_SECONDS:
            raise Again("its answer comes too slowly")


def check_encoding(encoding: str | None, host: str) -> None:
    """Refuse a compressed answer: nobody asked for one, and what it unpacks to has no bound. Raises QtoolError."""
    if encoding and encoding.strip().lower() != "identity":
        what = f"refused: it sends {encoding[:40]!r}, where the bytes themselves were asked for"
        raise QtoolError(what, where=host, hint="A proxy may do that: ask it not to compress.")


class Requests:
    """Counts the requests of one listing."""

    def __init__(self) -> None:
        self._left: int | None = None

    @contextmanager
    def of_listing(self) -> Iterator[None]:
        self._left = MOST_ANSWERS
        try:
            yield
        finally:
            self._left = None

    def one_more(self, host: str) -> None:
        """Raises InputError when a listing goes on and on."""
        if self._left is None:
            return
        self._left -= 1
        if self._left < 0:
            raise InputError(f"refused: its listing has more than {MOST_ANSWERS:,} parts", where=host)


@dataclass
class _Transfer:
    """A file on its way: what it is called, and what has come of it since when."""

    where: str
    since: float
    count: int = 0


@dataclass
class Pace:
    """Watches that files move on, whoever waits for their bytes and however long that one sleeps.

    Attributes:
        least: bytes that each must bring.
        window: in so many seconds.
    """

    least: int = LEAST_BYTES
    window: float = WINDOW_SECONDS
    clock: Callable[[], float] = time.monotonic
    _transfers: dict[int, _Transfer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def look_seconds(self) -> float:
        """How often `check` wants to be called."""
        return min(_LOOK_SECONDS, self.window)

    @contextmanager
    def transfer(self, where: str) -> Iterator[None]:
        """This thread asks for a file, and waits for it."""
        key = threading.get_ident()
        with self._lock:
            self._transfers[key] = _Transfer(where, self.clock())
        try:
            yield
        finally:
            with self._lock:
                self._transfers.pop(key, None)

    def moved(self, count: int) -> None:
        """So many bytes have come for this thread's file."""
        with self._lock:
            if transfer := self._transfers.get(threading.get_ident()):
                transfer.count += count

    def check(self) -> None:
        """Raises QtoolError when a file has brought less than `least` bytes in the last `window` seconds."""
        now = self.clock()
        with self._lock:
            for transfer in self._transfers.values():
                if now - transfer.since < self.window:
                    continue
                if transfer.count < self.least:
                    raise QtoolError(
                        f"only {transfer.count:,} bytes in {now - transfer.since:.0f} seconds; given up",
                        where=transfer.where,
                        hint="Run the same command again: it continues where it stopped.",
                    )
                transfer.since, transfer.count = now, 0
