"""What a person sees: progress, tables, warnings and errors on stderr; the result on stdout.

The only module that knows rich, which it imports when something has to be drawn.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from qtool import sizes
from qtool.errors import QtoolError, one_line

if TYPE_CHECKING:
    from types import TracebackType

    import rich.console
    import rich.live
    import rich.table


# What moves a terminal's cursor, changes its settings, or shows text in another order than it has.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_COMMAND = re.compile(r"\b(qtool|pip|pipx|python|hf) ")  # in a hint: to be copied in one piece
_LONGEST = 5000  # characters of a line: more than any path has


class Console:
    """One command's voice. Use it as a context manager: leaving it ends a progress bar cleanly.

    Args:
        quiet: only warnings, errors and the result.
        json: the result is printed as JSON.
        doing: what a terminal shows at once, until there is more to tell.
    """

    def __init__(self, quiet: bool = False, json: bool = False, doing: str | None = None) -> None:
        self.quiet = quiet
        self.json = json
        self._doing = doing
        self._live: rich.live.Live | None = None
        self._stage: _Stage | None = None

    def __enter__(self) -> Console:
        if self._doing is not None:
            self.status(self._doing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        stage, drawn = self._stage, self._live is not None
        self.end_progress()
        if kind is not None and drawn and stage is not None and stage.total:
            self.info(f"stopped in: {stage.name}, {stage.count}")

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

    def info(self, message: str, *, prose: bool = False) -> None:
        """Something nice to know; silent with --quiet.

        `prose` has no path and no command that somebody may want to copy: a terminal breaks it between words.
        """
        if not self.quiet:
            self._say(message, wrap=prose)

    def warning(self, message: str) -> None:
        """Something the user should know, though the work goes on."""
        self._say(f"warning: {message}", style="yellow", wrap=True)

    def error(self, error: QtoolError) -> None:
        """What went wrong and where, then what to do next: one to three lines."""
        self.end_progress()
        self._say(f"error: {one_line(error.what)}", style="red", wrap=True)
        if error.where is not None:
            self._say(f"  at: {one_line(error.where)}", style="red")
        if error.hint is not None:
            hint = one_line(error.hint)
            self._say(f"  → {hint}", wrap=not _COMMAND.search(hint))

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
            # A cell that is too wide takes another line: what is cut off can't be read anywhere.
            table.add_column(Text(_cell(column)), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        target = self._stdout if result else self._stderr
        if result and target.is_terminal:
            self.end_progress()
        with _to_stdout() if result else contextlib.nullcontext():
            if target.is_terminal:
                target.print(table)
            else:  # a log has no width: never cut a cell
                whole = target.measure(table, options=target.options.update(max_width=100_000)).maximum
                target.width = max(80, whole)  # a width of print's would be cut down to the console's
                target.print(table, soft_wrap=True)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show a worker's progress, status or warning event; others are not for the eyes."""
        if event["event"] == "warning":
            self.warning(event["message"])
        elif event["event"] == "status":
            self.status(event["what"])
        elif event["event"] == "progress" and not self.quiet:
            self.progress(event["stage"], event["done"], event["total"], event["unit"])

    def status(self, what: str) -> None:
        """What is being done now, before there is anything to count; only a terminal shows it."""
        if not self.quiet and self._stderr.is_terminal:
            self.progress(what, 0, 0)

    def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
        """A bar with rate and time left on a terminal, else one line as each stage begins.

        Only the stage that is under way has a bar. It goes away when the next stage begins, or the work ends.
        """
        if self.quiet:
            return
        stage = _cell(stage)
        if self._stage is None or self._stage.name != stage:
            self._stage = _Stage(stage, unit, first=done)
            if not self._stderr.is_terminal:
                self._say(f"{stage} ({amount(total, unit)})" if total else stage)
        self._stage.advance(done, total)
        if self._live is None and self._stderr.is_terminal:
            from rich.live import Live

            # Redirected, what another program is to read would go to the terminal.
            self._live = Live(
                get_renderable=self._drawn,
                console=self._stderr,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=10,
            )
            self._live.start(refresh=True)  # what is being done is seen even if it takes no time

    def end_progress(self) -> None:
        """Take the bar away and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._stage = None

    def _drawn(self) -> rich.table.Table | str:
        return "" if self._stage is None else self._stage.drawn()

    @cached_property
    def _stderr(self) -> rich.console.Console:
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, highlight=False)

    @cached_property
    def _stdout(self) -> rich.console.Console:
        from rich.console import Console as RichConsole

        return RichConsole(highlight=False)

    def _say(self, text: str, style: str | None = None, *, wrap: bool = False) -> None:
        """One message, above the bar if there is one; whole words are never broken, so that paths can be copied."""
        text = bounded(visible(text))
        if sys.stderr.isatty():
            text = _between_words(text, self._stderr.width) if wrap else text
            self._stderr.print(text, style=style, markup=False, emoji=False, soft_wrap=True)
        else:
            print(_encodable(text, sys.stderr), file=sys.stderr, flush=True)


def _between_words(text: str, width: int) -> str:
    """The lines broken where a terminal of this width would break them inside a word."""
    import textwrap

    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
    )


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


class _Stdout:
    """What has become of standard output in this run of the command line."""

    used = False


def begin() -> None:
    """A run of the command line begins."""
    _Stdout.used = False


def printed() -> bool:
    """Whether anything has been printed to standard output since then."""
    return _Stdout.used


def _print(text: str, end: str = "\n") -> None:
    """To standard output, as it is; on a terminal without what would command that."""
    _Stdout.used = True
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
        raise QtoolError(f"can't be written: {error.strerror}", where="standard output") from None


class _Stage:
    """A piece of work under way, and how fast it goes.

    Args:
        first: what is done when it begins. An earlier run did that, so it is no speed of this one.
    """

    def __init__(self, name: str, unit: str, first: int) -> None:
        self.name, self.unit, self.first = name, unit, first
        self.done, self.total = first, 0
        self.begun = self.moved = time.monotonic()

    def advance(self, done: int, total: int) -> None:
        if done != self.done:
            self.moved = time.monotonic()
        self.done, self.total = done, total

    @property
    def count(self) -> str:
        """How much is done, of how much."""
        if not self.total:
            return amount(self.done, self.unit)
        if self.unit == "bytes":
            return f"{amount(self.done, self.unit)}/{amount(self.total, self.unit)}"
        return f"{self.done}/{self.total} {self.unit}"

    @property
    def told(self) -> str:
        """The count, the mean rate of this run and the time left; or the time taken, while no more is known."""
        now = time.monotonic()
        taken = self.moved - self.begun
        # A rate over less than a second is chance.
        speed = (self.done - self.first) / taken if taken >= 1 else 0.0
        parts = [self.count] if self.done or self.total else []
        if speed:
            parts.append(_rate(speed, self.unit))
        if speed and self.total:
            left = max(0.0, (self.total - self.done) / speed - (now - self.moved))
            parts.append(f"{_clock(left)} left")
        else:
            parts.append(_clock(now - self.begun))
        return ", ".join(parts)

    def drawn(self) -> rich.table.Table:
        """One line, however narrow the terminal is."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_column(ratio=1, max_width=40)
        line.add_column(no_wrap=True, overflow="ellipsis")
        known = bool(self.total)
        bar = ProgressBar(self.total if known else None, self.done, pulse=not known, animation_time=time.monotonic())
        line.add_row(Text(self.name), bar, Text(self.told, style="cyan"))
        return line


def _rate(speed: float, unit: str) -> str:
    if unit == "bytes":
        return f"{amount(speed, unit)}/s"
    return f"{1 / speed:.1f} s/{unit[:-1]}" if speed < 1 and unit.endswith("s") else f"{speed:.1f} {unit}/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def amount(count: float, unit: str) -> str:
    """A number of things, bytes in the unit that suits them."""
    return sizes.show(count) if unit == "bytes" else f"{count} {unit}"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else bounded(visible(str(value).replace("\n", "\\n")))
