"""Sending files to a hub, and looking whether they arrived. Runs in the worker.

What the repository has already, by hash, is not sent again: so an interrupted upload continues.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from qtool.errors import InputError, QtoolError
from qtool.hub.access import Absent, Hub, Unreadable
from qtool.hub.listing import RemoteFile
from qtool.hub.patience import Patience
from qtool.hub.sink import Hashes
from qtool.hub.transfer import attempt

README = "README.md"


def publish(
    hub: Hub,
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    message: str,
    patience: Patience,
    progress: Callable[[int, int], None],
) -> tuple[str, list[str]]:
    """Have `files` in a repository, which is made if need be.

    Args:
        files: local files, or content, by path in the repository.
        private: for a repository that is made now.
        progress: called with files done and files in all.

    Returns:
        The commit, and the paths that were there already.

    Raises:
        InputError: no right to do so. QtoolError: the hub refuses, or has something else afterwards.
    """

    def persist(action: Callable[[], None]) -> None:
        patience.persist(lambda: attempt(hub, action), where=f"{hub.endpoint}/{repo}")

    if not hub.token:
        raise hub.unauthorized()
    persist(lambda: hub.create(repo, private))
    _, there = _listed(hub, repo, patience)
    missing = {path: files[path] for path in sorted(files, key=_readme_last) if not _same(files[path], there.get(path))}
    batches = [{path: content} for path, content in missing.items()] if hub.one_by_one else [missing]
    done = len(files) - len(missing)
    for batch in batches:
        progress(done, len(files))
        if batch:
            persist(lambda batch=batch: hub.send(repo, batch, message))  # type: ignore[misc]
        done += len(batch)
        progress(done, len(files))
    commit, there = _listed(hub, repo, patience)
    wrong = [path for path in files if not _same(files[path], there.get(path))]
    if wrong:
        raise QtoolError(
            f"{wrong[0]} differs on the hub from the local file",
            where=f"{hub.endpoint}/{repo}",
            hint="Run the same command again: files that arrived are not sent again.",
        )
    return commit, [path for path in files if path not in missing]


def _readme_last(path: str) -> tuple[bool, str]:
    return path == README, path


def _listed(hub: Hub, repo: str, patience: Patience) -> tuple[str, dict[str, RemoteFile]]:
    """The commit and the files; none for a repository that nobody has committed to."""
    try:
        listing = patience.persist(
            lambda: attempt(hub, lambda: hub.listing(repo, None)), where=f"{hub.endpoint}/{repo}"
        )
    except Absent:
        raise
    except (InputError, Unreadable):  # no branch yet
        return "", {}
    return listing.commit, {file.path: file for file in listing.files}


def _same(content: Path | bytes, file: RemoteFile | None) -> bool:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if file is None or file.size != size or not file.digest:
        return False
    hashes = Hashes(file)
    if isinstance(content, bytes):
        hashes.update(content)
    else:
        with content.open("rb") as stream:
            hashes.read(stream.fileno(), lambda count: None, threading.Event())
    return hashes.right
