"""Files on disk: written whole or not at all, looked at without surprises, and disk errors that a user can act on.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qtool import locks
from qtool.errors import InputError, QtoolError

_MAX_JSON_BYTES = 100_000_000  # as safetensors bounds its headers; indexes of the largest models take 30 MB

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# ---------------------------------------------------------------- a disk's errors


@contextlib.contextmanager
def disk_errors(path: Path, nbytes: int = 0, *, hint: str | None = None) -> Iterator[None]:
    """Turn the operating system's errors while `path` is written into a QtoolError that names it.

    Args:
        path: what is being made, as the user knows it.
        nbytes: how much of it could not be written; 0: nobody knows.
        hint: what to do next; None says it where the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            kind = InputError if error.errno == errno.ENAMETOOLONG else QtoolError
            raise kind(f"can't be written: {error.strerror}", where=str(path), hint=hint) from error
        amount = f"{nbytes:,} bytes could not be written, " if nbytes else ""
        limit = "the size limit for files (ulimit -f) is reached" if error.errno == errno.EFBIG else _free(path)
        raise QtoolError(
            f"no space left: {amount}{limit}",
            where=str(path),
            hint=hint or "Free some space or choose another --output.",
        ) from error


def check_free_space(path: str | Path, nbytes: int, option: str = "--output") -> None:
    """Raises QtoolError unless the file system of `path` (which need not exist yet) has room for `nbytes`.

    `option` is the one that names another place.
    """
    free = free_space(Path(path))
    if free < nbytes:
        raise QtoolError(
            f"needs {nbytes:,} bytes, {free:,} are free",
            where=str(path),
            hint=f"Free some space or choose another {option}.",
        )


def free_space(path: Path) -> int:
    """Free bytes where `path`, which need not exist yet, is or would be."""
    import shutil

    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def used_space(folder: Path) -> int:
    """Bytes that all files below `folder` take on the disk, holes not counted."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_blocks for path in paths) * 512


def _free(path: Path) -> str:
    try:
        return f"{free_space(path.parent):,} bytes are free"
    except OSError:
        return "the disk is full"


def check_new_file(file: Path, option: str, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that must not be written or can't be. `option` is the one that named it.

    Raises:
        InputError: it exists and `overwrite` is off, or is a folder; or its folder doesn't exist, or can't be written.
    """
    hint = f"Choose another {option}."
    if exists(file) and not overwrite:
        raise InputError("exists already", where=str(file), hint=f"Choose another {option}, or pass --overwrite.")
    if is_dir(file):
        raise InputError("is a folder", where=str(file), hint=hint)
    exists(draft(file))  # its name is longer
    folder = file.absolute().parent
    if not is_dir(folder):
        raise InputError("no such folder", where=str(folder), hint=hint)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError("this folder can't be written", where=str(folder), hint=hint)


# ---------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Have the file or folder on the disk before going on. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def draft(file: Path) -> Path:
    """Where a file's new content grows; one that a killed process left is used again."""
    return file.with_name(f".{file.name}.new")


def write_bytes(file: Path, content: bytes, *, hint: str | None = None) -> None:
    """A file, complete or not at all and on the disk; what it replaces stays until then and hands on its permissions.

    Raises:
        QtoolError: it can't be written; `hint` says what to do next, as in `disk_errors`.
    """
    new = draft(file)
    with disk_errors(file, len(content), hint=hint):
        handle = _open_draft(new)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(handle, stat.S_IMODE(file.stat().st_mode))
            os.ftruncate(handle, 0)
            view = memoryview(content)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
            new.replace(file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        sync(file.parent)


def write_text(file: Path, text: str, *, hint: str | None = None) -> None:
    """As `write_bytes`, in UTF-8; half a surrogate pair, which UTF-8 can't say, becomes a question mark."""
    write_bytes(file, text.encode("utf-8", "replace"), hint=hint)


def write_json(file: Path, value: Any, *, indent: int = 2, hint: str | None = None) -> None:
    """As `write_bytes`, a value as indented JSON."""
    write_bytes(file, encode_json(value, indent=indent), hint=hint)


def encode_json(value: Any, *, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8, and a line's end; half a surrogate pair, which UTF-8 can't say, is an escape."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode() + b"\n"


def _open_draft(new: Path) -> int:
    """Open a draft to write it, alone: two processes that write the same file take turns."""
    while True:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        locks.wait(handle, lambda: None)
        if locks.is_still(handle, new):
            return handle
        os.close(handle)  # meanwhile it has become the file itself


# ---------------------------------------------------------------- reading


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError for anything else."""
    try:
        if not is_file(file):
            raise InputError("no such file", where=str(file))
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise InputError("too large for a JSON file", where=str(file))
        value = json.loads(file.read_bytes().decode())
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(file)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not valid JSON: {error}", where=str(file), hint="Download or copy this file again."
        ) from None
    if not isinstance(value, dict):
        raise InputError("must hold a JSON object", where=str(file))
    return value


# ---------------------------------------------------------------- looking at a user's paths


def expand(path: str | Path) -> Path:
    """A path as a user gives it, a leading ~ meaning a home. Raises InputError when that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            str(error),
            where=str(path),
            hint="Write the whole path. If the name really begins with ~, write ./~ instead.",
        ) from None


def real(path: Path) -> Path:
    """The path without links, as far as it goes: `Path.resolve` raises RuntimeError for links that go in a circle."""
    return Path(os.path.realpath(path))


def exists(path: Path) -> bool:
    """Whether something is there, links followed.

    Raises:
        InputError: that can't be told: a folder above may not be entered, the name is too long, or no name at all.
    """
    return _looked_at(path) is not None


def is_file(path: Path) -> bool:
    """Whether a regular file is there, links followed. Raises InputError as `exists`."""
    return _is(path, stat.S_ISREG)


def is_dir(path: Path) -> bool:
    """Whether a folder is there, links followed. Raises InputError as `exists`."""
    return _is(path, stat.S_ISDIR)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    found = _looked_at(path)
    return found is not None and kind(found.st_mode)


def _looked_at(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"can't be accessed: {error.strerror}", where=str(path)) from None
    except ValueError as error:  # a null byte
        raise InputError(f"is not a valid path: {error}", where=ascii(str(path))) from None
