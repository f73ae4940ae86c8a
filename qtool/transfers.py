"""Between a device, main memory and the disk, without waiting for what each is still busy with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

# What waits to be written, at most: a disk that is being synced takes nothing for a second at times. A larger thing
# waits alone.
_MOST_BYTES = 1 << 29

T = TypeVar("T")


class Download:
    """Tensors on their way to main memory.

    Args:
        tensors: all on one device; they must not change before `result`, and new ones with their content are given.
            Those of main memory are handed out as they are.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._event: Any = None
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
        if device is None or not asynchronous(device):
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        # Only pinned memory is copied into while something else goes on; torch keeps what was pinned once.
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = mark(device)

    def result(self) -> list[torch.Tensor]:
        """The tensors in main memory, once they are there. May be called in another thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def asynchronous(device: torch.device) -> bool:
    """Whether it computes while this process goes on, and says with an event when it has come to a place."""
    module = getattr(torch, device.type, None)
    return device.type in ("cuda", "npu") and module is not None and bool(module.is_available())


def mark(device: torch.device) -> Any:
    """An event that comes when the device has done all that was asked of it so far."""
    module = getattr(torch, device.type)
    event = module.Event()
    event.record(module.current_stream())
    return event


class Behind:
    """Does things in threads of its own, behind its caller, by as much as main memory is given for; nothing more once
    one has failed.

    A context manager; leaving it without an error waits for all.

    Args:
        threads: 1 does one thing after the other, more do them in any order; 0 does all at once, in the caller's.
    """

    def __init__(self, *, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._under_way: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._failed = False

    def do(self, work: Callable[[], None], nbytes: int = 0) -> None:
        """Raises what this or earlier work does, here or in a later call.

        Args:
            nbytes: that it holds in main memory.
        """
        if self._pool is None:
            work()
            return
        while self._under_way and self._bytes + nbytes > _MOST_BYTES:
            self._wait_for_first()
        self._under_way.append((self._pool.submit(self._run, work), nbytes))
        self._bytes += nbytes

    def _wait_for_first(self) -> None:
        future, nbytes = self._under_way.popleft()
        self._bytes -= nbytes
        future.result()

    def wait(self) -> None:
        """Until all is done. Raises what one of them did."""
        while self._under_way:
            self._wait_for_first()

    def _run(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
            else:
                self._failed = True  # what waits is of no use any more
        finally:
            if self._pool is not None:
                self._pool.shutdown()


def ahead(read: Callable[[T], Any], places: Iterable[T], *, threads: int) -> Iterator[Any]:
    """What `read` gives for each of the places, the next ones read by threads while this one is made use of.

    Args:
        threads: so many are under way; 0 reads when it is asked for, in the caller's.
    """
    if not threads:
        yield from map(read, places)
        return
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future[Any]] = deque()
        for place in places:
            coming.append(pool.submit(read, place))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
