"""Running a command under watch: what it said, and the most that it took."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launcher import Launcher

MOST_SECONDS = 30.0  # of processor time: the machine may have other things to do
MOST_BYTES = 1 << 30
_HANGS = 600.0  # seconds until a command is ended
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Watched:
    """How a command ended; `seconds` of processor time and `peak` bytes, of it and its workers."""

    arguments: Sequence[str]
    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: int


def run(launcher: Launcher, arguments: Sequence[object], env: Mapping[str, str], folder: Path) -> Watched:
    """`qtool ARGUMENTS` in a folder, to its end."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
        began, seconds, peak = time.monotonic(), 0.0, 0
        with launcher.start(words, env=env, cwd=folder, stdin=nothing, stdout=out, stderr=err) as process:
            while process.poll() is None:
                used, most = _look(process.pid)
                seconds, peak = max(seconds, used), max(peak, most)
                if time.monotonic() - began > _HANGS or seconds > 2 * MOST_SECONDS or peak > 3 * MOST_BYTES:
                    process.terminate()
                    seconds = max(seconds, MOST_SECONDS + 1) if peak <= MOST_BYTES else seconds
                    process.wait()
                time.sleep(0.01)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    stdout, stderr = texts
    return Watched(words, process.returncode, stdout, stderr, seconds, peak)


def _look(pid: int) -> tuple[float, int]:
    """Seconds of processor time, and the most memory any one has had, of a process and those below it."""
    seconds, peak, pending = 0.0, 0, [pid]
    while pending:
        one = pending.pop()
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{one}/stat").read_bytes().rpartition(b")")[2].split()
            seconds += sum(map(int, fields[11:13])) / _TICKS
            status = Path(f"/proc/{one}/status").read_text()
            peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]) << 10)
            pending += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return seconds, peak


def problems(done: Watched, codes: Sequence[int] = (0, 2)) -> list[str]:
    """What is wrong with how a command took bad input."""
    found = []
    if done.code not in codes:
        found.append(f"exit code {done.code}")
    for sign in ("Traceback (most recent call last)", "bug in qtool"):
        if sign in done.stderr or sign in done.stdout:
            found.append(sign)
    if any(ord(c) < 32 and c not in "\n\t" for c in done.stderr):
        found.append("control characters")
    if done.seconds > MOST_SECONDS:
        found.append(f"took {done.seconds:.0f} s")
    if done.peak > MOST_BYTES:
        found.append(f"took {done.peak >> 20} MB")
    return found
