"""What both sides of a worker know: lines of JSON, and which events there are."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

from qtool.errors import ForeignError, InputError, QtoolError, WorkerDied, of_system, one_line

READ_AHEAD = 256  # inputs that a worker holds before it needs them

Event = dict[str, Any]

_KINDS: tuple[type[QtoolError], ...] = (ForeignError, InputError, WorkerDied)  # the special ones first
_TEXT = (str, type(None))
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "alive": {},
    "progress": {"stage": str, "done": (int, float), "total": (int, float), "unit": str},
    "status": {"what": str},
    "warning": {"message": str},
    "item": {"data": dict},
    "piece": {"index": int, "text": str},
    "result": {"data": dict},
    "error": {"type": str, "what": str, "where": _TEXT, "hint": _TEXT},
}


class Lines:
    """Cuts what comes in pieces into lines, in time that grows with the bytes and not with their square."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their ends."""
        first, *more = data.split(b"\n")
        self._rest.append(first)
        if not more:
            return []
        first, self._rest = b"".join(self._rest), [more.pop()]
        return [first, *more]


def encode(line: Mapping[str, Any]) -> bytes:
    """One line. Raises TypeError, ValueError: JSON can't say it."""
    return json.dumps(line).encode() + b"\n"


def decode(line: bytes) -> Event:
    """The event that a line is. Raises ValueError: it is none."""
    try:
        event = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    fields = _FIELDS.get(str(event.get("event"))) if isinstance(event, dict) else None
    if fields is None or not all(isinstance(event.get(name, ...), kind) for name, kind in fields.items()):
        raise ValueError("no event")
    return dict(event)


def error_event(error: BaseException) -> Event:
    """How an error is told to the other side. Errors that nobody foresaw come as a QtoolError."""
    if isinstance(error, OSError):
        error = of_system(error) or error
    kind = next(
        (known.__name__ for known in (ForeignError, InputError, WorkerDied) if isinstance(error, known)), "QtoolError"
    )
    if isinstance(error, QtoolError):
        return {"event": "error", "type": kind, "what": error.what, "where": error.where, "hint": error.hint}
    what = one_line(traceback.format_exception_only(error)[-1])
    return {"event": "error", "type": kind, "what": what, "where": None, "hint": None}


def as_exception(event: Event) -> Exception:
    """The error that an error event tells."""
    kind = next((known for known in _KINDS if known.__name__ == event["type"]), QtoolError)
    return kind(event["what"], where=event["where"], hint=event["hint"])
