"""Folders on disk, for a writer that never leaves anything half-done."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from pathlib import Path
from typing import Any

from qtool import locks
from qtool.checkpoint import journal
from qtool.errors import InputError
from qtool.files import disk_errors, exists, real, sync, used_space


def resumable_bytes(output: Path) -> int:
    """What an ended writer to `output` left on the disk for another one to go on with: that takes no space again."""
    left = output.parent.glob(f".{glob.escape(output.name)}.partial-*")
    return sum(used_space(folder) for folder in left if journal.read(folder))


def check_output(output: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output path that must not be written.

    Raises:
        InputError: it exists and `overwrite` is off, or it is not a model folder, or it is, holds or lies in `source`,
            or nothing can be made where it should lie.
    """
    if not output.name or output.name == "..":
        raise InputError("not a path for an output folder", where=str(output))
    exists(output.with_name(f".{output.name}.replaced-{os.getpid()}-10"))  # its longest name is one that can be
    if source is not None:
        ours, theirs = real(output), real(source)
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            raise InputError("output and input overlap", where=str(output), hint="Choose another --output.")
    nearest = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir():
        raise InputError(
            "not a folder, so no output can lie in it", where=str(nearest), hint="Choose another --output."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError("this folder can't be written", where=str(nearest), hint="Choose another --output.")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise InputError("exists already", where=str(output), hint="Choose another --output, or pass --overwrite.")
    if output.is_symlink() or not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise InputError(
            "is not a model folder, so --overwrite does not replace it",
            where=str(output),
            hint="Choose another --output.",
        )


def tidy(output: Path, *, keep_resumable: bool = False) -> Path | None:
    """Remove what dead writers to `output` left beside it and their journal in it; put back a model just moved aside.

    Returns:
        What can be resumed and was kept, if any.
    """
    kept = None
    with disk_errors(output):
        if journal.read(output) is not None:  # its writer died when all but this was done
            (output / journal.FILE).unlink(missing_ok=True)
        siblings = [*output.parent.iterdir()] if output.parent.is_dir() else []
        for path in siblings:
            if path.name.startswith(f".{output.name}.replaced-") and not os.path.lexists(output):
                path.rename(output)
            elif path.name.startswith((f".{output.name}.partial-", f".{output.name}.replaced-")):
                with locks.abandoned(path) as ours:
                    found = journal.read(path) if keep_resumable else None
                    if ours and found is not None and found[1]:
                        kept = path
                    elif ours:
                        shutil.rmtree(path, ignore_errors=True)
    return kept


def put_in_place(folder: Path, output: Path, *, overwrite: bool, aside: Path) -> None:
    """Rename a complete folder to `output`; an old one waits at `aside` and goes only after the new one is in place.

    Raises InputError when `output` has come into being and `overwrite` is off, OSError.
    """
    if overwrite and output.exists():
        output.rename(aside)
        try:
            folder.rename(output)
        except BaseException:
            aside.rename(output)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        try:
            folder.rename(output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise InputError("was made by another process in the meantime", where=str(output)) from None
            raise
    sync(output.parent)


class PartialFolder:
    """A hidden folder beside `output` that takes its place once complete, and vanishes otherwise.

    Its lock (on the folder itself) ends with this process, however that ends: an unlocked one is stale, and
    `tidy` removes it.
    """

    def __init__(self, output: Path, path: Path, handle: int) -> None:
        self.output = output
        self.path = path
        self._handle: int | None = handle

    @classmethod
    def make(cls, output: Path) -> PartialFolder:
        """A new one."""
        prefix, number = f".{output.name}.partial-{os.getpid()}", 1
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            while True:
                path = output.with_name(prefix if number == 1 else f"{prefix}-{number}")
                number += 1
                try:
                    path.mkdir()
                except FileExistsError:  # another writer of this process, or the same number in another container
                    continue
                if folder := cls._held(output, path):  # else another process has tidied it away
                    return folder

    @classmethod
    def _held(cls, output: Path, path: Path) -> PartialFolder | None:
        """The folder at `path`, if it is there and no other process has it. Raises OSError."""
        try:
            handle = locks.open_folder(path)
        except FileNotFoundError:
            return None
        if locks.lock(handle) and locks.is_still(handle, path):
            return cls(output, path, handle)
        os.close(handle)
        return None

    @staticmethod
    def check_alone(output: Path, own: PartialFolder | None = None) -> None:
        """That no other process writes this output; `own` is this one's folder, once there is one.

        To be asked before and after that is made: of two that begin at once, one at least finds the other.

        Raises:
            InputError: one does.
        """
        for path in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
            if own is not None and path == own.path:
                continue
            with contextlib.suppress(OSError):
                handle = locks.open_folder(path)
                taken = locks.attempt(handle) is locks.Lock.TAKEN
                os.close(handle)
                if taken:
                    raise _being_written(output)

    @classmethod
    def resume(
        cls, output: Path, key: str, *, restart: bool = False
    ) -> tuple[PartialFolder, list[dict[str, Any]]] | None:
        """What an ended writer of this key left, with the entries of its journal; None when there is nothing.

        Raises InputError when there is only work of another key; with `restart` that is removed instead.
        """
        other = None
        for path in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-*")):
            found = journal.read(path)
            if found is None or not found[1]:
                continue
            if found[0] != key:
                other = path
                continue
            with disk_errors(output):
                folder = cls._held(output, path)
            if folder is None:
                raise _being_written(output)
            _, entries = journal.read(path) or found  # it may have grown before it became ours
            return folder, entries
        if other is not None and restart:
            tidy(output)
        elif other is not None:
            raise InputError(
                "the unfinished earlier run used another model, recipe, calibration, version or number of threads",
                where=str(other),
                hint="Give the options of that run, or leave out --resume to start over.",
            )
        return None

    def commit(self, *, overwrite: bool, without: str | None = None) -> None:
        """Make this folder the output, without one file; an old output goes only after the new one is in place.

        That file is a journal: until the folder is in place, another writer could have to go on from it.
        """
        for file in [*self.path.rglob("*"), self.path]:
            sync(file)
        old = self.output.with_name(self.path.name.replace(".partial-", ".replaced-"))
        put_in_place(self.path, self.output, overwrite=overwrite, aside=old)
        if without is not None:
            (self.output / without).unlink(missing_ok=True)
            sync(self.output)
        self._unlock()

    def leave(self) -> None:
        """For another writer to go on with."""
        self._unlock()

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _being_written(output: Path) -> InputError:
    return InputError("another process is writing this output", where=str(output), hint="Wait for it.")
