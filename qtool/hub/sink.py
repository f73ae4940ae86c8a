"""Where a client writes a file it downloads: to the disk, through a hash, and never more than was announced."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from qtool.hub.listing import RemoteFile
from qtool.hub.patience import StartOver, Stopped
from qtool.hub.storage import errors

CHUNK = 1 << 22


class Hashes:
    """sha256, and git's sha1 of the blob where the hub announces that: of the bytes so far."""

    def __init__(self, file: RemoteFile) -> None:
        self._wanted = file.digest
        self._sha256 = hashlib.sha256()
        self._git = None
        if file.algorithm == "git-sha1":
            self._git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        if self._git:
            self._git.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def right(self) -> bool:
        """Whether the bytes are those the hub announced."""
        return (self._git or self._sha256).hexdigest() == self._wanted

    def read(self, handle: int, moved: Callable[[int], None], stop: threading.Event) -> int:
        """Take in an open file from its start, and return how long it is."""
        position, buffer = 0, bytearray(CHUNK)
        view = memoryview(buffer)
        while count := os.preadv(handle, [buffer], position):
            if stop.is_set():
                raise Stopped
            self.update(view[:count])
            position += count
            moved(count)
        return position


class Sink:
    """A file-like object over an incomplete file, positioned after what is there already.

    It has what the `http_get` of huggingface_hub 2.4 and of openmind_hub 1.3 use: write, tell, seek and truncate,
    the latter two to start over when a server ignores the range it was asked for.

    Args:
        handle: of the incomplete file; stays open.
        file: what is to come.
        where: the file, for messages.
        moved: called with the number of bytes that came (negative when starting over).
        stop: makes the next write raise Stopped.
    """

    def __init__(
        self, handle: int, file: RemoteFile, where: Path, moved: Callable[[int], None], stop: threading.Event
    ) -> None:
        self.file = file
        self._handle, self._where, self._moved, self._stop = handle, where, moved, stop
        self._hashes = Hashes(file)
        self._position = 0
        if os.fstat(handle).st_size > file.size:
            self.restart()
        else:
            with errors(where):
                self._position = self._hashes.read(handle, moved, stop)

    def write(self, data: bytes) -> int:
        """Append. Raises StartOver when that is more than was announced, QtoolError when the disk is full, Stopped."""
        if self._stop.is_set():
            raise Stopped
        if self._position + len(data) > self.file.size:
            raise StartOver(f"the server sends more than the {self.file.size:,} bytes announced")
        view = memoryview(data)
        while view:
            with errors(self._where):
                count = os.pwrite(self._handle, view, self._position)
            self._hashes.update(view[:count])
            self._position += count
            self._moved(count)
            view = view[count:]
        return len(data)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """To where the file was when opened, or to the start: both mean starting over."""
        if position != self._position:
            self.restart()
        return self._position

    def truncate(self) -> int:
        """Nothing is ever behind the position."""
        return self._position

    def restart(self) -> None:
        """Forget everything that came."""
        with errors(self._where):
            os.ftruncate(self._handle, 0)
        self._moved(-self._position)
        self._position, self._hashes = 0, Hashes(self.file)

    def flush(self) -> None:
        """Have it on the disk."""
        with errors(self._where):
            os.fsync(self._handle)

    @property
    def whole(self) -> bool:
        return self._position == self.file.size

    @property
    def right(self) -> bool:
        """Whether what came is what was announced."""
        return self.whole and self._hashes.right

    @property
    def sha256(self) -> str:
        return self._hashes.sha256
