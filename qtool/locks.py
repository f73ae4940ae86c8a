"""Locks on files and folders, which say that somebody is at work there.

A lock belongs to the open file: it is held for as long as that is open, here or in a child that inherits it, and so
ends with its holders, however they end. Some file systems have no locks (many network and FUSE mounts). There everyone
goes on as if alone, but nothing is removed because nobody seems to hold it.

Standard library only.
"""

from __future__ import annotations

import enum
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

File = IO[bytes] | IO[str] | int


class Lock(enum.Enum):
    """How trying to lock a file ended: it is ours, another process has it, or the file system has no locks."""

    OURS = enum.auto()
    TAKEN = enum.auto()
    UNKNOWN = enum.auto()


def attempt(file: File) -> Lock:
    """Lock an open file or folder if nobody else has, without waiting."""
    return _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock(file: File) -> bool:
    """Lock an open file or folder; False if another process has it, True also where there are no locks."""
    return attempt(file) is not Lock.TAKEN


def wait(file: File, on_wait: Callable[[], None]) -> None:
    """Lock an open file or folder; `on_wait` is called once if another process has it and this one must wait."""
    if not lock(file):
        on_wait()
        _flock(file, fcntl.LOCK_EX)


@contextmanager
def abandoned(folder: Path) -> Iterator[bool]:
    """Lock what a dead process may have left; whether it is sure that nobody has it (not if it can't be opened)."""
    try:
        handle = open_folder(folder)
    except OSError:
        yield False
        return
    try:
        yield attempt(handle) is Lock.OURS
    finally:
        os.close(handle)


def open_folder(folder: Path) -> int:
    """A handle to lock a folder by. Raises OSError."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def is_still(handle: int, path: Path) -> bool:
    """Whether `path` names what is open: not removed or made anew before it could be locked. Raises OSError."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _flock(file: File, how: int) -> Lock:
    try:
        fcntl.flock(file, how)
    except (BlockingIOError, PermissionError):  # the latter where the file system makes it of a range lock
        return Lock.TAKEN
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP; EBADF from NFS, for what is open for reading only
        return Lock.UNKNOWN
    return Lock.OURS
