"""What this process writes: whatever lies outside a folder is found, though only what Python itself does is seen."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
}  # fmt: skip
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_found: list[str] | None = None
_hooked = False


@contextlib.contextmanager
def writes(allowed: Path) -> Iterator[list[str]]:
    """Collects the paths that are written, made or removed outside `allowed` meanwhile."""
    global _found, _hooked
    if not _hooked:  # a hook stays for ever
        sys.addaudithook(_hook)
        _hooked = True
    found: list[str] = []
    _found = found
    try:
        yield found
    finally:
        _found = None
        found[:] = [path for path in found if not Path(path).is_relative_to(allowed)]


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _found is None:
        return
    if event == "open":
        path, _, flags = args
        if not isinstance(flags, int) or not flags & _TO_WRITE or flags & os.O_TMPFILE == os.O_TMPFILE:
            return
        paths = [path]
    elif event in _CHANGES:
        paths = list(args[: 2 if event in ("os.link", "os.rename", "os.symlink") else 1])
    else:
        return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            told = os.path.abspath(os.fsdecode(path))
            if told != os.devnull and "__pycache__" not in told:
                _found.append(told)
