"""Errors that a user can act on.

Each says what went wrong, where, and what to do next; the command line prints exactly that and
exits with `exit_code`. Anything else that escapes is a bug and shows as one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

Code = Literal["input", "usage", "foreign", "failed", "worker_died", "interrupted", "bug"]
"""The kinds of errors, for programs."""


class QtoolError(Exception):
    """Something failed while working (exit code 1).

    Args:
        what: one sentence, what went wrong.
        where: the file, tensor, line or option concerned.
        hint: what to do next.
    """

    exit_code = 1
    code: ClassVar[Code] = "failed"

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def to_json(self) -> dict[str, str | None]:
        """For programs: `qtool.printed.ErrorObject`."""
        return {"code": self.code, "message": self.what, "where": self.where, "hint": self.hint}

    def __str__(self) -> str:
        return self.what if self.where is None else f"{self.where}: {self.what}"


class InputError(QtoolError):
    """Wrong usage or bad input: the user has to change something before trying again (exit code 2)."""

    exit_code = 2
    code: ClassVar[Code] = "input"


class ForeignError(InputError):
    """Another library fails on the user's input; the log of a worker where that happens tells more."""

    code = "foreign"


class WorkerDied(QtoolError):
    """A worker process was killed or ended without a word: what it did may work the next time."""

    code = "worker_died"


class UsageProblem(InputError):
    """The command line itself is wrong: an unknown option, or a value of the wrong kind."""

    code = "usage"


class Interrupted(QtoolError):
    """Ctrl-C, or a signal that asks for the end."""

    exit_code = 130
    code = "interrupted"


class Bug(QtoolError):
    """What nobody expected."""

    code = "bug"


@contextmanager
def foreign(what: str, *, where: str | None = None, hint: str | None = None) -> Iterator[None]:
    """Around another library's loader, which may raise anything on bad input, Rust's panics included.

    Raises:
        ForeignError: "`what`: " and the library's words. Not for qtool's own errors, lack of memory and Ctrl-C.
    """
    try:
        yield
    except (QtoolError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        raise ForeignError(f"{what}: {in_one_line(error)}", where=where, hint=hint) from error


_INPUT = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS}


def of_system(error: OSError) -> QtoolError | None:
    """What the operating system says of a file, where nobody foresaw it; None: it says so of none."""
    if error.filename is None or error.strerror is None:
        return None
    kind = InputError if error.errno in _INPUT else QtoolError
    return kind(f"can't be used: {error.strerror}", where=str(error.filename))


def in_one_line(error: BaseException) -> str:
    """Another library's message, however long and spread out, fit to stand inside one of ours."""
    return one_line(str(error))[:300] or type(error).__name__


def one_line(text: str) -> str:
    """The words of a text, with one blank between them."""
    return " ".join(text.split())
