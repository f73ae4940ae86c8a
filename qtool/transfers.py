"""Between a device, main memory and the disk, without waiting for what each is still busy with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

_MOST = 4  # things that wait to be written: each may hold a whole weight in int8

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
    """Does one thing after the other in a thread of its own, a few behind its caller; nothing more once one has failed.

    A context manager; leaving it without an error waits for all.

    Args:
        thread: False does everything at once, in the caller's.
    """

    def __init__(self, *, thread: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if thread else None
        self._under_way: deque[Future[None]] = deque()
        self._failed = False

    def do(self, work: Callable[[], None]) -> None:
        """Raises what this or earlier work does, here or in a later call."""
        if self._pool is None:
            work()
            return
        while len(self._under_way) >= _MOST:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(self._run, work))

    def wait(self) -> None:
        """Until all is done. Raises what one of them did."""
        while self._under_way:
            self._under_way.popleft().result()

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


def ahead(read: Callable[[T], Any], places: Iterable[T], *, thread: bool) -> Iterator[Any]:
    """What `read` gives for each of the places, the next one read by a thread while this one is made use of.

    Args:
        thread: False reads when it is asked for, in the caller's.
    """
    if not thread:
        yield from map(read, places)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Any] | None = None
        for place in places:
            found, coming = coming, pool.submit(read, place)
            if found is not None:
                yield found.result()
        if coming is not None:
            yield coming.result()
