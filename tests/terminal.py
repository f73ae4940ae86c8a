"""A command in a terminal of its own, and what somebody in front of it sees: pyte draws what the command writes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pyte
from rich.style import Style
from rich.text import Text

Start = Callable[..., "subprocess.Popen[Any]"]


class Terminal:
    """A process whose standard streams are one terminal. Use it as a context manager: leaving it ends the process.

    Args:
        start: as subprocess.Popen, or `Launcher.start`.
        env: the process's variables; those that speak of terminals are set here.
        size: columns and lines.

    Attributes:
        written: all that the process has written, with its escapes.
    """

    def __init__(
        self, start: Start, command: Sequence[object], *, env: Mapping[str, str], size: tuple[int, int], **options: Any
    ) -> None:
        columns, lines = size
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=0.001)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        own = {name: value for name, value in env.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = start(
            command,
            env={**own, "TERM": "xterm-256color"},
            stdin=follower,
            stdout=follower,
            stderr=follower,
            **options,
        )
        os.close(follower)

    def write(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def read(self, wait: float) -> bool:
        """Take what has been written, or wait for it so many seconds; False once nobody can write any more."""
        if not select.select([self._leader], [], [], wait)[0]:
            return True
        try:
            data = os.read(self._leader, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.written += data
        self._stream.feed(data)
        return bool(data)

    def until(self, pattern: str, seconds: float = 120) -> str:
        """The screen as soon as the pattern is on it."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, self.text
            assert self.read(0.1), f"it ended: {self.text}"
        return self.text

    def end(self, seconds: float = 300) -> int:
        """The exit code, once all is read."""
        end = time.monotonic() + seconds
        while self.read(0.1):
            assert time.monotonic() < end, self.text
        return self.process.wait(60)

    @property
    def lines(self) -> list[str]:
        """What is on the screen, and what has left it at the top; without blanks at the ends of lines."""
        width = self._screen.columns
        gone = ["".join(line[x].data for x in range(width)) for line in self._screen.history.top]
        return [line.rstrip() for line in (*gone, *self._screen.display)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip("\n")

    @property
    def styled(self) -> list[Text]:
        """The same lines in their colours, without empty ones at the end."""
        screen = self._screen
        rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
        lines = []
        for row in rows[: len(self.text.splitlines())]:
            line = Text()
            for x in range(screen.columns):
                cell = row[x]
                colour = None if cell.fg == "default" else cell.fg
                colour = f"#{colour}" if colour and re.fullmatch("[0-9a-f]{6}", colour) else colour
                colour = colour.replace("brown", "yellow").replace("bright", "bright_") if colour else None
                line.append(cell.data, Style(color=colour, bold=cell.bold, italic=cell.italics))
            line.rstrip()
            lines.append(line)
        return lines

    @property
    def cursor_is_shown(self) -> bool:
        return not self._screen.cursor.hidden

    @property
    def drawn(self) -> str:
        """All that has ever been drawn, in its order, without what moves the cursor or colours it."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.written.decode(errors="replace"))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)
        os.close(self._leader)
