"""The hidden folder beside the target in which a download grows until it is complete.

`.NAME.partial/complete` holds files that have been checked, `.NAME.partial/incomplete` the bytes so far of the others;
both survive whatever happens, and a rerun continues from them. The folder is locked while somebody downloads into it.
Every path below it is opened part by part without following links, so neither a hub's file name nor a link that
somebody planted leads out of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path

from qtool import locks
from qtool.errors import InputError
from qtool.files import disk_errors
from qtool.hub.listing import RemoteFile

COMPLETE = "complete"
INCOMPLETE = "incomplete"


def partial_path(target: Path) -> Path:
    """Where a download to `target` grows."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Make `folder` and hold it alone; it may be gone afterwards.

    Args:
        folder: a partial folder.
        waiting: called once when another process holds it.

    Raises:
        InputError: it is a link, or belongs to another user.
        QtoolError: it can't be made.
    """
    with errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    tell = cache(waiting)  # once
    while True:
        with errors(folder):
            folder.mkdir(mode=0o755, exist_ok=True)
            handle = _open_own(folder)
        try:
            locks.wait(handle, tell)
            if locks.is_still(handle, folder):
                yield
                return
        finally:
            os.close(handle)


class Storage:
    """The inside of a partial folder, by names relative to it. Close it when done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with errors(folder):
            self._root = _open_own(folder)
            self._tops = {top: self._descend(self._root, [top]) for top in (COMPLETE, INCOMPLETE)}

    def __enter__(self) -> Storage:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in [*self._tops.values(), self._root]:
            os.close(handle)

    def open_incomplete(self, file: RemoteFile) -> int:
        """A handle to read and write what has come of `file` so far; the file is made if need be."""
        with errors(self.folder):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(_key(file), flags, 0o644, dir_fd=self._tops[INCOMPLETE])
            return _regular(handle, self.folder / INCOMPLETE)

    def open_complete(self, path: str) -> int | None:
        """A handle to read a finished file, or None when there is none."""
        *parents, name = path.split("/")
        with errors(self.folder):
            try:
                parent = self._descend(self._tops[COMPLETE], parents, make=False)
            except FileNotFoundError:
                return None
            try:
                return _regular(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent), Path(path))
            except FileNotFoundError:
                return None
            finally:
                os.close(parent)

    def finish(self, file: RemoteFile) -> None:
        """What has come of `file` is right: give it its place and name."""
        *parents, name = file.path.split("/")
        with errors(self.folder):
            parent = self._descend(self._tops[COMPLETE], parents)
            try:
                os.rename(_key(file), name, src_dir_fd=self._tops[INCOMPLETE], dst_dir_fd=parent)
            finally:
                os.close(parent)

    def discard(self, path: str) -> None:
        """A finished file turned out to be wrong."""
        *parents, name = path.split("/")
        with errors(self.folder):
            parent = self._descend(self._tops[COMPLETE], parents)
            try:
                os.unlink(name, dir_fd=parent)
            finally:
                os.close(parent)

    def keep_only(self, wanted: AbstractSet[str]) -> None:
        """Remove finished files that are not wanted any more, and folders left empty."""
        with errors(self.folder):
            for parent, folders, files, handle in os.fwalk(".", topdown=False, dir_fd=self._tops[COMPLETE]):
                for name in files:
                    if Path(parent, name).as_posix() not in wanted:
                        os.unlink(name, dir_fd=handle)
                for name in folders:
                    if stat.S_ISLNK(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                        os.unlink(name, dir_fd=handle)
                        continue
                    with contextlib.suppress(OSError):  # not empty
                        os.rmdir(name, dir_fd=handle)

    def adopt(self, source: Path, files: Sequence[RemoteFile]) -> None:
        """Start from what another folder has: link its files here, to be checked like any that were here before."""
        for file in files:
            *parents, name = file.path.split("/")
            with contextlib.suppress(OSError):
                status = (source / file.path).lstat()
                if stat.S_ISREG(status.st_mode) and status.st_size == file.size:
                    parent = self._descend(self._tops[COMPLETE], parents)
                    try:
                        os.link(source / file.path, name, dst_dir_fd=parent, follow_symlinks=False)
                    finally:
                        os.close(parent)

    def _descend(self, start: int, parts: list[str], *, make: bool = True) -> int:
        handle = os.dup(start)
        for part in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=handle)
            try:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
            finally:
                os.close(handle)
            handle = below
        return handle


def present(folder: Path, files: Sequence[RemoteFile]) -> int:
    """How many bytes of `files` a partial folder has already, whether right or not."""
    found = 0
    for file in files:
        for path in (folder / COMPLETE / file.path, folder / INCOMPLETE / _key(file)):
            with contextlib.suppress(OSError):
                found += min(path.lstat().st_size, file.size)
    return found


def remove(folder: Path) -> None:
    """Remove an emptied partial folder."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def errors(where: Path) -> Iterator[None]:
    """As `disk_errors`; what says that a link or a file stands in the way is an InputError."""
    with disk_errors(where, hint="Free some space, then run the same command again: it continues where it stopped."):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise InputError(
                "refused: a link or a file stands where a folder or a file of the download belongs",
                where=str(where),
                hint="Another program put it there: remove it, or choose another --to.",
            ) from None


def _key(file: RemoteFile) -> str:
    """A flat name for a file's bytes so far; another version of the file has another."""
    return hashlib.sha256(f"{file.digest} {file.path}".encode()).hexdigest()[:40]


def _open_own(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if os.fstat(handle).st_uid != os.geteuid():
        os.close(handle)
        raise InputError("refused: it belongs to another user", where=str(folder), hint="Choose another --to.")
    return handle


def _regular(handle: int, where: Path) -> int:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise InputError("refused: it is not a regular file", where=str(where), hint="Remove it and try again.")
    return handle
