"""Lines and events."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from qtool.errors import InputError, QtoolError, WorkerDied
from qtool.workers import protocol


def test_lines_come_out_as_they_went_in() -> None:
    """However they are cut."""
    draw = random.Random(0)
    wanted = [bytes(draw.choices(b"abc", k=draw.choice((0, 1, 5, 300)))) for _ in range(200)]
    data = b"".join(line + b"\n" for line in wanted) + b"rest"
    for most in (1, 7, 1000, len(data)):
        lines, found, left = protocol.Lines(), [], data
        while left:
            size = draw.randint(1, most)
            found += lines.feed(left[:size])
            left = left[size:]
        assert found == wanted
        assert lines.feed(b"\n") == [b"rest"]


def test_a_long_line_takes_time_that_grows_with_its_length() -> None:
    """Were every piece joined to all those before, 64 MB would be 33 GB of copying."""
    lines, piece = protocol.Lines(), bytes(1 << 16)
    started = time.process_time()
    for _ in range(1000):
        assert lines.feed(piece) == []
    assert [len(line) for line in lines.feed(b"\n")] == [65_536_000]
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "event",
    [
        {"event": "alive"},
        {"event": "progress", "stage": "s", "done": 1, "total": 2.5, "unit": "layers"},
        {"event": "warning", "message": "é\ud800"},
        {"event": "item", "data": {"a": [None]}},
        {"event": "result", "data": {}},
        {"event": "error", "type": "QtoolError", "what": "x", "where": None, "hint": "y"},
    ],
)
def test_events(event: dict[str, Any]) -> None:
    assert protocol.decode(protocol.encode(event).removesuffix(b"\n")) == event


@pytest.mark.parametrize(
    "line",
    [
        b"", b"x", b"\xff\x00", b"null", b"[]", b"{}", b'"result"', b'{"event": 1}', b'{"event": []}',
        b'{"event": "other"}',
        b'{"event": "result"}', b'{"event": "result", "data": []}', b'{"event": "result", "data": {}', b"[" * 100_000,
        b'{"event": "progress", "stage": "s", "done": "1", "total": 2, "unit": "layers"}', b'{"event": "warning"}',
        b'{"event": "error", "type": "E", "what": null, "where": null, "hint": null}', b'{"event": "error"}',
        b"1" * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_event(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        protocol.decode(line)


class Own(InputError):
    """A kind of error that the other side doesn't know."""


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (InputError("a", where="b", hint="c"), InputError, ("a", "b", "c")),
        (Own("a"), InputError, ("a", None, None)),
        (WorkerDied("a", hint="c"), WorkerDied, ("a", None, "c")),
        (QtoolError("a"), QtoolError, ("a", None, None)),
        (ValueError("two\n  lines"), QtoolError, ("ValueError: two lines", None, None)),
        (json.JSONDecodeError("bad", "x", 0), QtoolError,
         ("json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)", None, None)),
        (KeyError("a"), QtoolError, ("KeyError: 'a'", None, None)),
        (PermissionError(13, "Permission denied", "/a"), InputError, ("can't be used: Permission denied", "/a", None)),
        (OSError(5, "Input/output error", "/a"), QtoolError, ("can't be used: Input/output error", "/a", None)),
        (OSError(5, "Input/output error"), QtoolError, ("OSError: [Errno 5] Input/output error", None, None)),
        (KeyboardInterrupt(), QtoolError, ("KeyboardInterrupt", None, None)),
    ],
)  # fmt: skip
def test_errors_cross(error: BaseException, kind: type[QtoolError], told: tuple[Any, ...]) -> None:
    found = protocol.as_exception(protocol.decode(protocol.encode(protocol.error_event(error))))
    assert type(found) is kind
    assert (found.what, found.where, found.hint) == told
