"""An output folder that is either complete or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qtool.errors import InputError, QtoolError


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, an output that exists or cannot be made.

    With `overwrite` only what looks like a model (it has a config.json) or is empty may be replaced.

    Raises:
        InputError: see above.
    """
    try:
        _check_output(path, overwrite)
    except OSError as error:
        raise InputError(f"can't use this output: {error.strerror}", where=str(path)) from None


def _check_output(path: Path, overwrite: bool) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError("the output exists and is not a folder", where=str(path))
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise InputError("the output exists", where=str(path), hint="use another --output, or --overwrite")
        if not (path / "config.json").is_file():
            raise InputError("the output is a folder but no model: it is not overwritten", where=str(path))
    parent = path.absolute().parent
    existing = next(folder for folder in [parent, *parent.parents] if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError("can't write there", where=str(existing), hint="use another --output")


@contextlib.contextmanager
def output_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new, empty folder beside `path`, which takes its name when the block ends, or is removed if it fails.

    Raises:
        InputError: as `check_output`.
        QtoolError: it can't be made or renamed.
    """
    check_output(path, overwrite=overwrite)
    path = path.absolute()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        partial.mkdir()
    except OSError as error:
        raise QtoolError(f"can't make the output folder: {error.strerror}", where=str(partial)) from None
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # some writers make private files
            _fsync(file)
        _fsync(partial)
        _take_the_place_of(path, partial)
    except OSError as error:
        raise QtoolError(f"can't finish the output: {error.strerror or error}", where=str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_the_place_of(path: Path, partial: Path) -> None:
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _fsync(path.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """What a killed process left behind under the same name."""
    for folder in path.parent.glob(f".{_escaped(path.name)}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
