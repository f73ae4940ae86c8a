"""Bringing a repository's files into a partial folder: several at a time, each continued, each checked."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NoReturn, TypeVar

from qtool.errors import QtoolError
from qtool.hub.access import Hub
from qtool.hub.bounds import Pace
from qtool.hub.listing import Listing, RemoteFile
from qtool.hub.patience import Again, Patience, StartOver, Stopped
from qtool.hub.sink import Hashes, Sink
from qtool.hub.storage import Storage, errors

_EVENT_SECONDS = 0.1
Item = TypeVar("Item")
Value = TypeVar("Value")


def attempt(hub: Hub, action: Callable[[], Value]) -> Value:
    """`action`, with what the client raises put into our words. Raises Again, Stopped, QtoolError, InputError."""
    try:
        return action()
    except (Again, Stopped, QtoolError):
        raise
    except Exception as error:
        meaning = hub.explain(error)
        if meaning is None:
            raise
        raise meaning from None


def fetch(
    hub: Hub,
    listing: Listing,
    folder: Path,
    progress: Callable[[str, int, int], None],
    *,
    workers: int,
    patience: Patience,
    pace: Pace | None = None,
) -> dict[str, str]:
    """Have all of `listing.files` in the partial folder, complete and right.

    Args:
        hub: where they come from.
        listing: what is wanted, already checked.
        folder: a partial folder that this process, or its parent, holds.
        progress: called with a stage, bytes done and bytes in all.
        workers: files at a time.
        patience: per file.
        pace: how slow a file may be.

    Returns:
        sha256 by path.

    Raises:
        QtoolError, InputError: the first failure, after the others have been stopped. What came stays in the folder.
    """
    stop, pace = hub.stop, pace or Pace()
    with Storage(folder) as storage:
        found = _existing(storage, listing.files)
        check = Meter("checking what is there", sum(file.size for file in found), progress)

        def recheck(file: RemoteFile) -> tuple[str, str | None]:
            return file.path, _recheck(storage, file, check.moved, stop)

        hashes = {path: digest for path, digest in in_parallel(recheck, found, workers, stop) if digest}
        missing = sorted((file for file in listing.files if file.path not in hashes), key=lambda file: file.size)
        meter = Meter("downloading", sum(file.size for file in missing), progress)

        def bring(file: RemoteFile) -> tuple[str, str]:
            return file.path, _bring(hub, listing, storage, file, meter, stop, patience, pace)

        hashes.update(in_parallel(bring, missing, workers, stop, pace))
        meter.show()
    return hashes


def in_parallel(
    action: Callable[[Item], Value],
    items: Sequence[Item],
    workers: int,
    stop: threading.Event,
    pace: Pace | None = None,
) -> list[Value]:
    """`action` on each item, in any order. The first failure sets `stop`, and is raised when all have ended; or at once
    when `pace` finds one too slow, which its thread, waiting for bytes, can't be told."""
    pool = ThreadPoolExecutor(workers)
    futures = [pool.submit(action, item) for item in items]
    try:
        while wait(futures, pace.look_seconds if pace else None, return_when=FIRST_EXCEPTION).not_done:
            if pace is None or any(future.done() and future.exception() for future in futures):
                break
            pace.check()
        if not all(future.done() and not future.exception() for future in futures):
            stop.set()
            wait(futures)
    except BaseException:  # this thread is told to end: the others must not keep it
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    failures = [error for future in futures if (error := future.exception())]
    if failures:
        raise next((error for error in failures if not isinstance(error, Stopped)), failures[0])
    return [future.result() for future in futures]


class Meter:
    """Counts bytes of several threads, and tells about it ten times a second."""

    def __init__(self, stage: str, total: int, progress: Callable[[str, int, int], None]) -> None:
        self.stage, self.total, self._progress = stage, total, progress
        self._done, self._told, self._lock = 0, 0.0, threading.Lock()

    def moved(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._told < _EVENT_SECONDS:
                return
            self._told = time.monotonic()
            self._progress(self.stage, self._done, self.total)

    def show(self) -> None:
        if self.total:
            self._progress(self.stage, self._done, self.total)


def _existing(storage: Storage, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    found = []
    for file in files:
        handle = storage.open_complete(file.path)
        if handle is not None:
            os.close(handle)
            found.append(file)
    return found


def _recheck(storage: Storage, file: RemoteFile, moved: Callable[[int], None], stop: threading.Event) -> str | None:
    """The sha256 of a file from an earlier run, or None when it is not right (and is gone now)."""
    handle = storage.open_complete(file.path)
    if handle is None:
        return None
    try:
        hashes = Hashes(file)
        if os.fstat(handle).st_size == file.size:
            with errors(storage.folder / file.path):
                hashes.read(handle, moved, stop)
            if hashes.right:
                return hashes.sha256
    finally:
        os.close(handle)
    storage.discard(file.path)
    return None


def _bring(
    hub: Hub,
    listing: Listing,
    storage: Storage,
    file: RemoteFile,
    meter: Meter,
    stop: threading.Event,
    patience: Patience,
    pace: Pace,
) -> str:
    """Download one file, continuing it, and give it its place. Returns its sha256."""
    where = f"{listing.repo}/{file.path}"
    handle = storage.open_incomplete(file)
    wrong = 0
    try:

        def moved(count: int) -> None:
            meter.moved(count)
            pace.moved(max(0, count))

        sink = Sink(handle, file, storage.folder / file.path, moved, stop)

        def start_over(why: str) -> NoReturn:
            nonlocal wrong
            sink.restart()
            wrong += 1
            if wrong > 1:
                hint = "The file was changed on the way or on the hub. If the branch has just moved, run it again."
                raise QtoolError(f"{why}, twice over", where=where, hint=hint)
            raise Again(why)

        def once() -> None:
            if stop.is_set():
                raise Stopped
            if not sink.whole:
                try:
                    with pace.transfer(where):
                        attempt(hub, lambda: hub.fetch(listing, file, sink))
                except StartOver as again:
                    start_over(str(again))
            if not sink.whole:
                raise Again(f"the file ends after {sink.tell():,} of {file.size:,} bytes")
            if not sink.right:
                start_over("the bytes are not those the hub announced (the hash differs)")

        patience.persist(once, where=where, stop=stop, progress=sink.tell)
        sink.flush()
        storage.finish(file)
        return sink.sha256
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)
