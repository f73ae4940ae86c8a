"""What of a long job is finished: lines of JSON beside its files, so that it can go on after any kind of end.

A killed process loses nothing that it gave to the kernel; a machine that goes down loses what was not yet on the
disk. So a line counts if it was written since this machine came up, or if a later one says that all was synced.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from qtool.files import write_text

FILE = "journal.jsonl"
_SYNC_SECONDS = 5.0


class Journal:
    """The journal in `folder`, open for more lines.

    Args:
        folder: where it lies.
        key: tells one job from another.
        entries: how many lines of an earlier run to keep; the rest is cut off.
    """

    def __init__(self, folder: Path, key: str, entries: list[dict[str, Any]]) -> None:
        lines = [{"key": key, "boot": _boot()}, *({"entry": entry} for entry in entries)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(folder / FILE, text)
        self._file = (folder / FILE).open("ab", buffering=0)
        self._synced = time.monotonic()

    def append(self, entry: dict[str, Any]) -> None:
        self._write({"entry": entry})

    @property
    def due(self) -> bool:
        """Whether the last sync is long ago."""
        return time.monotonic() - self._synced > _SYNC_SECONDS

    def synced(self) -> None:
        """All that the entries so far speak of is on the disk."""
        self._write({"synced": True})
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        content = memoryview((json.dumps(line, separators=(",", ":")) + "\n").encode())
        while content:
            content = content[self._file.write(content) :]


def read(folder: Path) -> tuple[str, list[dict[str, Any]]] | None:
    """(key, the entries that count) of the journal in `folder`; None when there is none."""
    try:
        text = (folder / FILE).read_bytes()
    except OSError:
        return None
    lines: list[dict[str, Any]] = []
    for line in text.splitlines(keepends=True):
        try:
            parsed = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(parsed, dict):
            break
        lines.append(parsed)
    if not lines or not isinstance(lines[0].get("key"), str):
        return None
    counted = len(lines)
    if lines[0].get("boot") != _boot():
        counted = max((i for i, line in enumerate(lines) if line.get("synced")), default=0)
    return lines[0]["key"], [line["entry"] for line in lines[1:counted] if "entry" in line]


def _boot() -> str:
    """Differs after every start of this machine; where that can't be told, with every call."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{os.getpid()}-{time.time_ns()}"
