"""When to try again, how long to wait, and when to give up.

Waits grow exponentially with jitter, and only failures that brought nothing new count: a link that drops every minute
is slow, not broken. Standard library only, because a worker's interpreter has a hub's client and nothing else.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qtool.errors import QtoolError

Result = TypeVar("Result")
_NOTICED = 0.75  # seconds


class Again(Exception):
    """Failed in a way that may be gone at the next try: a broken connection, a server too busy.

    Args:
        what: one line.
        after: seconds the server asked to wait.
    """

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


class StartOver(Again):
    """What came so far is of no use."""


class Stopped(Exception):
    """Somebody else's failure, or the user, ended this."""


@dataclass(frozen=True)
class Patience:
    """`tries` in a row that bring nothing, with waits around base * 2^n seconds, at most `cap`.

    `say` is told of each wait that somebody may wonder about: why, for how long, and how many tries have failed. `hint`
    goes with the error once it is given up.
    """

    tries: int = 5
    base: float = 0.5
    cap: float = 30.0
    longest_order: float = 300.0  # what a server may ask for; beyond it, give up
    say: Callable[[str], None] = lambda _: None
    hint: str = "Run the same command again: it continues where it stopped."

    def persist(
        self,
        action: Callable[[], Result],
        *,
        where: str,
        stop: threading.Event | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> Result:
        """Call `action` until it does not raise `Again`, and return its result.

        Args:
            where: what is being done, for the message.
            stop: ends a wait at once.
            progress: what has been reached; a new maximum makes up for earlier failures.

        Raises:
            QtoolError: given up. Stopped: `stop` was set. Whatever else `action` raises.
        """
        stop = stop or threading.Event()
        failures, best = 0, progress()
        while True:
            try:
                return action()
            except Again as again:
                reached = progress()
                failures = 1 if reached > best else failures + 1
                best = max(best, reached)
                wait = max(again.after, random.uniform(0.5, 1) * min(self.cap, self.base * 2**failures))
                if failures >= self.tries or wait > max(self.cap, self.longest_order):
                    raise QtoolError(
                        f"{again}; given up after {failures} tries without progress",
                        where=where,
                        hint=self.hint,
                    ) from None
                if wait >= _NOTICED:
                    self.say(f"{where}: {again}; next try in {wait:.0f} s ({failures} of {self.tries} failed)")
            if stop.wait(wait):
                raise Stopped
