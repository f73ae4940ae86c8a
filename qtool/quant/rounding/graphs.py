"""Many small operations on a CUDA device as one launch.

Each takes the device a few microseconds, and Python several times as long to ask for. A CUDA graph has them asked for
once; it runs the same kernels in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

Function = Callable[..., tuple[torch.Tensor, ...]]
_MOST = 8  # recordings that are kept
_kept: dict[Hashable, Function] = {}
_refused = False  # what can't be recorded once won't be another time


def usable(device: torch.device) -> bool:
    """Whether graphs can be captured there."""
    return device.type == "cuda" and torch.cuda.is_available() and not _refused


def recorded(function: Function, examples: Sequence[torch.Tensor]) -> Function:
    """The recording of a function, as `Captured`; the function itself where CUDA can't record it."""
    global _refused
    try:
        return Captured(function, examples)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation that waits for the device, in this version of torch
        _refused = True
        return function


def captured(key: Hashable, function: Function, examples: Sequence[torch.Tensor]) -> Function:
    """The recording of a function that depends on its arguments alone, and on what `key` holds: made once."""
    found = _kept.pop(key, None) or recorded(function, examples)
    _kept[key] = found
    if len(_kept) > _MOST:
        del _kept[next(iter(_kept))]
    return found


def forget() -> None:
    """Give back what recordings hold of the device's memory."""
    _kept.clear()


class Captured:
    """A function of tensors, on a device that `usable` says yes to.

    Args:
        function: always the same operations, without a look at their results; it may overwrite its arguments.
        examples: arguments for it; each later one has the shape and type of these, or smaller ones, for which the
            function itself is called.
    """

    def __init__(self, function: Function, examples: Sequence[torch.Tensor]) -> None:
        self._function = function
        self._arguments = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in examples]
        for own, example in zip(self._arguments, examples, strict=True):
            own.copy_(example)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up at a first call must not be captured
            function(*self._arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Unlike torch.cuda.graph this empties no caches; and what other threads do meanwhile is none of its business.
        with torch.cuda.stream(stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._results = function(*self._arguments)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The arguments stay as they are; the results are overwritten by the next call."""
        if arguments[0].shape != self._arguments[0].shape:
            return self._function(*arguments)
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results
