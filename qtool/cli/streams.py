"""The standard streams, which whoever starts a command may have closed, or filled, or gone away from."""

from __future__ import annotations

import io
import os
import sys

from qtool.errors import InputError


class _Forgiving(io.FileIO):
    """A file whose errors don't matter: what can't be told is not told, and the work goes on."""

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        try:
            return super().write(view)
        except OSError:
            return view.nbytes


_closed: set[int] = set()


def mend() -> None:
    """Give every stream that was closed /dev/null, lest a file of ours take its number, and make the errors of standard
    error our own affair. Call it before anything else is opened."""
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            _closed.add(number)
            _plug(number)
    if 0 in _closed:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if 1 in _closed:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    encoding = "utf-8" if 2 in _closed else sys.stderr.encoding
    raw = io.BufferedWriter(_Forgiving(2, "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)


def problem() -> InputError | None:
    """What keeps a command from telling its result, if anything does."""
    if 1 not in _closed:
        return None
    return InputError("is closed", where="standard output", hint="Send it to a file, or to /dev/null.")


def _plug(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(null, number)
        os.close(null)
