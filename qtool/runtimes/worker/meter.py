"""What a worker has done, and how long it took."""

from __future__ import annotations

import time
from typing import Any

from qtool.workers import Report

REPORT_SECONDS = 0.1


class Meter:
    """Counts answers and tokens, reports them now and then, and keeps the times of the cold start."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds: dict[str, float] = {}
        self.answers = self.tokens = 0
        self._began = self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on `stage`."""
        self.seconds[stage] = round(time.monotonic() - self._last, 3)
        self._last = time.monotonic()

    def begin(self) -> None:
        """The model is ready."""
        self._began = time.monotonic()
        self._progress()

    def add(self, tokens: int) -> None:
        """One more answer is there."""
        self.answers += 1
        self.tokens += tokens
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self._progress()

    def end(self, runtime: str) -> dict[str, Any]:
        """The worker's result: runtime, tokens, answers, and the seconds each stage took."""
        self._progress()
        self.seconds["generate"] = round(time.monotonic() - self._began, 3)
        return {"runtime": runtime, "answers": self.answers, "tokens": self.tokens, "seconds": self.seconds}

    def _progress(self) -> None:
        self._last = time.monotonic()
        self.report.progress("generate", self.answers, 0, unit="answers")
