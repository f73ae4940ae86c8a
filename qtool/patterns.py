"""Regular expressions of strangers: in recipes, in quantization configs, on the command line.

They are Python's (`re`), as transformers, compressed-tensors and vLLM read them, and these search by trying: a short
pattern can take longer than anybody lives. One of which it can be said beforehand that it won't is matched right here.
Every other is matched by a process of its own, whose time and memory end.

Standard library only: any interpreter that has an engine runs this.
"""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from functools import lru_cache

from qtool.errors import InputError
from qtool.workers import processes
from qtool.workers.limited import Ended, Helper, Refused

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
            try:
                return _matcher.ask([self._pattern, how, text])
            except (Ended, Refused):
                return None
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


_PROGRAM = """
import re

def found(request):
    pattern, how, text = request
    return getattr(re.compile(pattern), how)(text) is not None

serve(found)
"""


def _interpreter(*arguments: str) -> tuple[list[str], dict[str, str]]:
    return processes.isolated_python(sys.executable, "-S", *arguments), {}


_matcher = Helper(_PROGRAM, SECONDS, memory=1 << 29, interpreter=_interpreter)
