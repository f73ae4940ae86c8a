"""Regular expressions of strangers: in recipes, in quantization configs, on the command line.

They are Python's (`re`), as transformers, compressed-tensors and vLLM read them, and these search by trying: a short
pattern can take longer than anybody lives. One of which it can be said beforehand that it won't is matched right here.
Every other is matched by a process of its own, whose time and memory end.

Standard library only: any interpreter that has an engine runs this.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from functools import lru_cache

from qtool.errors import InputError
from qtool.workers import processes

SECONDS = 2.0  # of processor time that one pattern may take in all
_LONGEST = 20_000  # characters of a pattern
_MOST_TRIES = 2e7  # ways to match one text that are tried here
_BRIEF = 0.001  # seconds that count for nothing: no honest match takes them
_HINT = "write it simpler: a repeated group such as (a+)+ or many .* in a row can take for ever"


def check(pattern: str) -> None:
    """Raises ValueError, with the reason, unless it is a regular expression."""
    _compiled(pattern)


def fullmatch(pattern: str, text: str, where: str) -> bool:
    """Whether the pattern matches the whole text.

    Args:
        where: the pattern comes from there, for messages.

    Raises:
        ValueError: it is no regular expression. InputError: matching takes more than SECONDS in all.
    """
    return _Limited.of(pattern).finds("fullmatch", text, where)


def match(pattern: str, text: str, where: str) -> bool:
    """Whether the pattern matches from the start of the text. Raises as `fullmatch`."""
    return _Limited.of(pattern).finds("match", text, where)


def search(pattern: str, text: str, where: str) -> bool:
    """Whether the pattern is found anywhere in the text. Raises as `fullmatch`."""
    return _Limited.of(pattern).finds("search", text, where)


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _LONGEST:
        raise ValueError(f"not a regular expression of at most {_LONGEST:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that may mean something else one day
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"not a regular expression: {what}") from None


class _Limited:
    """One pattern, and how much time it has taken."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._compiled = _compiled(pattern)
        self._ways = _ways(pattern)
        self._spent = 0.0

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(pattern: str) -> _Limited:
        return _Limited(pattern)

    def finds(self, how: str, text: str, where: str) -> bool:
        answer = None if self._spent > SECONDS else self._found(how, text)
        if answer is None:
            self._spent = math.inf
            shown = self._pattern if len(self._pattern) <= 80 else f"{self._pattern[:80]}…"
            raise InputError(f"the pattern {shown!r} takes too long to match", where=where, hint=_HINT)
        found, seconds = answer
        if seconds > _BRIEF:
            self._spent += seconds
        return found

    def _found(self, how: str, text: str) -> tuple[bool, float] | None:
        """Whether it matches, and the seconds that took; None when it would be too many."""
        starts = len(text) + 1 if how == "search" else 1
        if starts * self._ways.on(len(text)) > _MOST_TRIES:
            return _matcher.ask(self._pattern, how, text)
        began = time.thread_time()
        found = getattr(self._compiled, how)(text) is not None
        return found, time.thread_time() - began


class _Ways:
    """A bound on the number of ways in which a pattern is tried on a text."""

    def __init__(self, repeats: float, choices: float) -> None:
        self._repeats, self._choices = repeats, choices

    def on(self, length: int) -> float:
        if math.isinf(self._repeats) or self._repeats > 20:
            return math.inf
        return self._choices * math.comb(length + int(self._repeats), int(self._repeats))


def _ways(pattern: str) -> _Ways:
    """Repeated single characters share the text among them: as many ways as there are to divide it, per choice of
    alternatives and of what is optional. A repeated group may have any number."""
    plain = re.sub(r"\\.", "a", pattern, flags=re.DOTALL)
    if re.search(r"\)[*+{]", plain):
        return _Ways(math.inf, 1)
    groups, bars = plain.count("(") or 1, plain.count("|")
    optional = plain.count("?") - plain.count("(?")
    exponent = groups * math.log2(bars / groups + 1) + optional
    return _Ways(sum(map(plain.count, "*+{")), 2.0 ** min(exponent, 100))


# What the process runs: a line of JSON in, a line out. It ends when its input does, or when its time or memory has.
_PROGRAM = """
import json, re, resource, sys, time, warnings
warnings.simplefilter("ignore")
limit, memory = float(sys.argv[1]), 1 << 29
hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
for line in sys.stdin.buffer:
    pattern, how, text = json.loads(line)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(began + limit + 1), hard))
    found = getattr(re.compile(pattern), how)(text) is not None
    print(json.dumps([found, time.process_time() - began]), flush=True)
"""


class _Matcher:
    """The process that matches what may take long. It is started when it is needed, and again after it had to end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: processes.Child | None = None
        self._owner = 0

    def ask(self, pattern: str, how: str, text: str) -> tuple[bool, float] | None:
        """Whether it was found, and the seconds that took; None when it took more than a pattern may."""
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps([pattern, how, text]).encode() + b"\n")
                child.stdin.flush()
                found, seconds = json.loads(child.stdout.readline())
                return bool(found), float(seconds)
            except (OSError, ValueError):  # it ended: too much time or memory
                processes.end(child)
                self._child = None
                return None
            except BaseException:  # Ctrl-C: its answer would be taken for the next one's
                processes.end(child)
                self._child = None
                raise

    def _running(self) -> processes.Child:
        if self._child is None or self._owner != os.getpid():  # a fork of this process must not share it
            command = processes.isolated_python(sys.executable, "-S", "-c", _PROGRAM, str(SECONDS))
            self._child = processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={})
            self._owner = os.getpid()
        return self._child


_matcher = _Matcher()
with contextlib.suppress(AttributeError):  # a fork while another thread asks would find the lock taken for ever
    os.register_at_fork(after_in_child=lambda: setattr(_matcher, "_lock", threading.Lock()))
