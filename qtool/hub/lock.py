"""`qtool.lock.json`: what a downloaded folder is, so that it can be checked later without the network."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import LOCK
from qtool.errors import InputError
from qtool.files import read_json
from qtool.hub.listing import HUBS, Listing, RemoteFile
from qtool.hub.names import name_problem
from qtool.hub.sink import Hashes
from qtool.hub.storage import errors
from qtool.hub.transfer import Meter, in_parallel
from qtool.version import __version__

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_COMMIT = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Lock:
    """The contents of a qtool.lock.json.

    Attributes:
        hub, endpoint, repo, revision, commit: as in `Listing`.
        files: path to size and sha256.
    """

    hub: str
    endpoint: str
    repo: str
    revision: str
    commit: str
    files: dict[str, tuple[int, str]]

    def covers(self, listing: Listing) -> bool:
        """Whether this is exactly what the listing names (git's sha1 is not in here; commit and size stand for it)."""
        if (self.hub, self.repo) != (listing.hub, listing.repo) or set(self.files) != {f.path for f in listing.files}:
            return False
        same_commit = self.commit == listing.commit
        for file in listing.files:
            size, sha256 = self.files[file.path]
            if size != file.size or (sha256 != file.digest if file.algorithm == "sha256" else not same_commit):
                return False
        return True


def write(folder: Path, listing: Listing, hashes: Mapping[str, str]) -> None:
    """Write the lock of a folder that holds `listing.files`, with their sha256 by path."""
    data = {
        "qtool": __version__,
        "hub": listing.hub,
        "endpoint": listing.endpoint,
        "repo": listing.repo,
        "revision": listing.revision,
        "commit": listing.commit,
        "files": {
            file.path: {"size": file.size, "sha256": hashes[file.path]}
            for file in sorted(listing.files, key=lambda file: file.path)
        },
    }
    with errors(folder), (folder / LOCK).open("x", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read(folder: Path) -> Lock | None:
    """The lock of a folder, or None when it has none. Raises InputError for one that is not as qtool writes it."""
    file = folder / LOCK
    if not os.path.lexists(file):
        return None
    data = read_json(file)
    try:
        files = {path: _entry(path, entry) for path, entry in data["files"].items()}
        texts = {key: data[key] for key in ("hub", "endpoint", "repo", "revision", "commit")}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"is not a lock file of qtool: {error}", where=str(file)) from None
    if not all(isinstance(text, str) for text in texts.values()):
        raise InputError("is not a lock file of qtool: a name is not text", where=str(file))
    if texts["hub"] not in HUBS or not _REPO.fullmatch(texts["repo"]) or not _COMMIT.fullmatch(texts["commit"]):
        raise InputError("is not a lock file of qtool: no hub has such a repository", where=str(file))
    return Lock(**texts, files=files)


def _entry(path: str, entry: Any) -> tuple[int, str]:
    if problem := name_problem(path):
        raise ValueError(f"{ascii(path)[:80]}: {problem}")
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or len(sha256) != 64:
        raise ValueError(f"{path}: no size or no hash")
    return size, sha256


def missing(folder: Path, lock: Lock) -> list[str]:
    """Files that are not there in the right size: quick, and blind to wrong bytes."""
    return [path for path, (size, _) in lock.files.items() if _size(folder / path) != size]


def verify(folder: Path, lock: Lock, progress: Callable[[str, int, int], None], *, workers: int) -> dict[str, str]:
    """Read every file of the lock and compare; what is wrong, by path: empty when all is well."""
    stop = threading.Event()
    meter = Meter("verifying", sum(size for size, _ in lock.files.values()), progress)

    def check(path: str) -> tuple[str, str | None]:
        size, sha256 = lock.files[path]
        return path, _problem(folder / path, RemoteFile(path, size, sha256), meter.moved, stop)

    found = in_parallel(check, sorted(lock.files), workers, stop)
    meter.show()
    return {path: problem for path, problem in found if problem}


def unknown(folder: Path, lock: Lock) -> list[str]:
    """Files of the folder that the lock does not name."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in found if path != LOCK and path not in lock.files)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _problem(path: Path, file: RemoteFile, moved: Callable[[int], None], stop: threading.Event) -> str | None:
    size = _size(path)
    if size is None:
        return "is missing"
    if size != file.size:
        return f"has {size:,} bytes instead of {file.size:,}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            hashes = Hashes(file)
            hashes.read(handle, moved, stop)
        finally:
            os.close(handle)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return None if hashes.right else "has other bytes than were downloaded"
