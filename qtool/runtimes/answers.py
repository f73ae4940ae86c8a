"""The file in which answers gather, so that a long job can be continued."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qtool.errors import InputError, QtoolError
from qtool.files import disk_errors, encode_json, exists, write_json
from qtool.locks import lock
from qtool.runtimes.lines import Line
from qtool.runtimes.results import belongs

_CHUNK = 1 << 16
_LATER = "Free some space, then run the same command with --resume: it continues where it stopped."
_ANEW = "Give the same prompts and options as before, or start over with --overwrite."


class Answers:
    """A file that answers are appended to, one line each, in order; `with` closes it.

    While a job is unfinished its settings are in `.NAME.qtool.json` beside it: who continues it must have the same.

    Args:
        settings: what decides how an answer turns out.
        resume: continue the file, if there is one.
        overwrite: begin anew, if there is one.

    Raises:
        InputError: the file is there, and neither resume nor overwrite; it was made with other settings, or it can't be
            told; it can't be written; another process is writing it.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        self._settings = path.with_name(f".{path.name}.qtool.json")
        self._known: Mapping[str, Any] | None = None
        there = exists(path) and path.stat().st_size > 0  # one that never got as far leaves an empty file
        if there and not (resume or overwrite):
            hint = "--resume continues it, --overwrite starts over."
            raise InputError("it already has answers", where=str(path), hint=hint)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"can't be written: {error.strerror}", where=str(path)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            hint = "Without --output the answers go to standard output, a pipe for example."
            raise InputError("this is not a regular file, so it can't be continued", where=str(path), hint=hint)
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        if not lock(self._file):
            self._file.close()
            raise InputError("another process is writing it", where=str(path))
        if there and resume:
            self._cut_torn_line()
            with contextlib.suppress(FileNotFoundError, ValueError):
                self._known = json.loads(self._settings.read_bytes())
        else:
            self._file.truncate()
        self._now = json.loads(json.dumps(settings))
        self._to_come = True
        self.errors = 0  # of the answers that were there

    def skip(self, lines: Iterator[Line]) -> int:
        """Pass over the lines that are answered; returns how many. To be called before the first `write`.

        Raises:
            InputError: an answer is to another prompt than the one at its place, or made with other settings.
        """
        count = errors = 0
        for found in self._file:
            line = next(lines, None)
            if line is None:
                raise InputError("it has more answers than there are prompts", where=str(self.path), hint=_ANEW)
            count += 1
            try:
                value = json.loads(found)
            except ValueError:
                value = None
            if not isinstance(value, dict) or not belongs(line, value):
                where = f"{self.path}:{count}"
                raise InputError(f"this is not an answer to prompt {count}", where=where, hint=_ANEW)
            errors += "error" in value and value["error"] is not None
        self.errors = errors
        if count and self._known is not None and self._known != self._now:
            names = self._known.keys() | self._now.keys()
            changed = sorted(name for name in names if self._known.get(name) != self._now.get(name))
            raise InputError(
                f"its answers were made with another {', '.join(changed)}", where=str(self.path), hint=_ANEW
            )
        self._to_come = not count or self._known is not None
        return count

    def begin(self) -> None:
        """There is more to write.

        Raises:
            InputError: the file is complete as it is, and how it was made is not known any more.
            QtoolError: nothing can be written beside it.
        """
        if not self._to_come:
            what = "it was finished with fewer prompts, and its settings are no longer known"
            raise InputError(what, where=str(self.path), hint=_ANEW)
        write_json(self._settings, self._now, indent=1, hint=_LATER)
        self._file.seek(0, os.SEEK_END)

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one answer; it is in the file when this returns.

        Raises:
            QtoolError: it could not be written, or not all of it.
        """
        with disk_errors(self.path, hint=_LATER):
            self._file.write(encode_json(value))
            self._file.flush()

    def finish(self) -> None:
        """All prompts are answered."""
        with disk_errors(self._settings, hint=_LATER):
            self._settings.unlink(missing_ok=True)

    def _cut_torn_line(self) -> None:
        """A process that was killed while it wrote leaves half a line."""
        end = self._file.seek(0, os.SEEK_END)
        position = end
        while position:
            start = max(0, position - _CHUNK)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)
        self._file.seek(0)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with disk_errors(self.path, hint=_LATER):
                self._file.close()
        except QtoolError:
            if kind is None:  # else what could not be written has been told already, and would be in the way here
                raise
