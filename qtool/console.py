"""What a person sees: progress, tables, warnings and errors on stderr; the result on stdout.

The only module that knows rich, which it imports when something has to be drawn.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from qtool import sizes
from qtool.errors import one_line

if TYPE_CHECKING:
    from types import TracebackType

    import rich.console
    import rich.progress

    from qtool.errors import QtoolError


# What moves a terminal's cursor, changes its settings, or shows text in another order than it has.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LONGEST = 5000  # characters of a line: more than any path has


class Console:
    """One command's voice. Use it as a context manager: leaving it ends a progress bar cleanly.

    Args:
        quiet: only warnings, errors and the result.
        json: the result is printed as JSON.
    """

    def __init__(self, quiet: bool = False, json: bool = False) -> None:
        self.quiet = quiet
        self.json = json
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._stage: str | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end_progress()

    # ------------------------------------------------------------ stdout

    def result(self, value: Any, *, more: bool = False) -> None:
        """Print the result: as JSON with --json or if it is a mapping or a list, else as it is.

        `more` says that it is one of several: JSON takes one line then, and a progress bar elsewhere goes on.
        """
        if not more or sys.stdout.isatty():
            self.end_progress()
        encoding = sys.stdout.encoding or "utf-8"
        if self.json or isinstance(value, Mapping | list):
            indent = 2 if sys.stdout.isatty() and not more else None
            plain = encoding.lower().replace("-", "") != "utf8"
            text = jsonlib.dumps(value, indent=indent, ensure_ascii=plain, default=str)
        else:
            text = str(value)
        _print(text)

    def piece(self, text: str) -> None:
        """Print a part of a result, as it comes; `result` prints the last of it."""
        self.end_progress()
        _print(text, end="")

    # ------------------------------------------------------------ stderr

    def info(self, message: str) -> None:
        """Something nice to know; silent with --quiet."""
        if not self.quiet:
            self._say(message)

    def warning(self, message: str) -> None:
        """Something the user should know, though the work goes on."""
        self._say(f"warning: {message}", style="yellow")

    def error(self, error: QtoolError) -> None:
        """What went wrong and where, then what to do next: one to three lines."""
        self.end_progress()
        lines = [f"error: {one_line(error.what)}"]
        if error.where is not None:
            lines.append(f"  at: {one_line(error.where)}")
        self._say("\n".join(lines), style="red")
        if error.hint is not None:
            self._say(f"  → {one_line(error.hint)}")

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, result: bool = False
    ) -> None:
        """A table; numbers are aligned to the right. On stdout if it is the result, else silent with --quiet."""
        if self.quiet and not result:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(_cell(title)), title_justify="left", title_style="bold", header_style="bold")
        for i, column in enumerate(columns):
            numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
            table.add_column(Text(_cell(column)), justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        target = self._stdout if result else self._stderr
        with _to_stdout() if result else contextlib.nullcontext():
            if target.is_terminal:
                target.print(table)
            else:  # a log has no width: never cut a cell
                target.print(table, width=max(80, target.measure(table).maximum), soft_wrap=True)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show a worker's progress or warning event; others are not for the eyes."""
        if event["event"] == "warning":
            self.warning(event["message"])
        elif event["event"] == "progress" and not self.quiet:
            self.progress(event["stage"], event["done"], event["total"], event["unit"])

    def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
        """A bar with rate and time left on a terminal, else one line as each stage begins."""
        if self.quiet:
            return
        stage = _cell(stage)
        if not self._stderr.is_terminal:
            if stage != self._stage:
                self._say(f"{stage} ({amount(total, unit)})" if total else stage)
            self._stage = stage
            return
        if self._bar is None:
            self._bar = _bar(self._stderr)
            self._bar.start()
        if stage != self._stage or self._task is None:
            # what an earlier run did is no speed of this one
            self._stage, self._task = stage, self._bar.add_task(stage, total=total or None, completed=done, unit=unit)
        self._bar.update(self._task, completed=done, total=total or None)

    def end_progress(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = self._stage = None

    @cached_property
    def _stderr(self) -> rich.console.Console:
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, highlight=False)

    @cached_property
    def _stdout(self) -> rich.console.Console:
        from rich.console import Console as RichConsole

        return RichConsole(highlight=False)

    def _say(self, text: str, style: str | None = None) -> None:
        """One message, not wrapped (so that paths can be copied), above the bar if there is one."""
        text = bounded(visible(text))
        if sys.stderr.isatty():
            self._stderr.print(text, style=style, markup=False, emoji=False, soft_wrap=True)
        else:
            print(_encodable(text, sys.stderr), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Text of a stranger's, fit for a terminal: what would command that is shown as an escape, as JSON has it."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def bounded(text: str) -> str:
    """The text with long lines cut off."""
    if len(text) <= _LONGEST:
        return text
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= _LONGEST else f"{line[:_LONGEST]}… ({len(line):,} characters)" for line in lines
    )


def _print(text: str, end: str = "\n") -> None:
    """To standard output, as it is; on a terminal without what would command that."""
    with _to_stdout():
        text = visible(text) if sys.stdout.isatty() else text
        print(_encodable(text, sys.stdout), end=end, flush=True)


def _encodable(text: str, stream: TextIO) -> str:
    """Text from a model can hold lone surrogates; no terminal setting may turn that into a traceback."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def _to_stdout() -> Iterator[None]:
    """A disk that is full is no bug; and that nobody reads any more is for the command line to know."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        from qtool.errors import QtoolError

        raise QtoolError(f"can't be written: {error.strerror}", where="standard output") from None


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    from rich import progress
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            unit, speed = task.fields["unit"], task.finished_speed or task.speed
            if not speed:
                return Text("")
            if unit == "bytes":
                return Text(f"{amount(speed, unit)}/s", style="cyan")
            slow = speed < 1 and unit.endswith("s")
            return Text(f"{1 / speed:.1f} s/{unit[:-1]}" if slow else f"{speed:.1f} {unit}/s", style="cyan")

    class Count(progress.MofNCompleteColumn):
        def render(self, task: progress.Task) -> Text:
            if task.fields["unit"] != "bytes":
                return super().render(task)
            return Text(f"{amount(task.completed, 'bytes')}/{amount(task.total or 0, 'bytes')}")

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        Count(),
        Rate(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def amount(count: float, unit: str) -> str:
    """A number of things, bytes in the unit that suits them."""
    return sizes.show(count) if unit == "bytes" else f"{count} {unit}"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else bounded(visible(str(value).replace("\n", "\\n")))
