"""Many small operations on a CUDA device as one launch.

Each takes the device a few microseconds, and Python several times as long to ask for. A CUDA graph has them asked for
once; it runs the same kernels in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Function = Callable[..., tuple[torch.Tensor, ...]]


def usable(device: torch.device) -> bool:
    """Whether graphs can be captured there."""
    return device.type == "cuda" and torch.cuda.is_available()


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
        with torch.cuda.graph(self._graph):
            self._results = function(*self._arguments)

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The arguments stay as they are; the results are overwritten by the next call."""
        if arguments[0].shape != self._arguments[0].shape:
            return self._function(*arguments)
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._results
