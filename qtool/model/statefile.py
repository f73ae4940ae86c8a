"""What passes from one decoder layer to the next, of all calibration samples, on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from qtool.model.activations import Activations
from qtool.model.state import State
from qtool.transfers import Behind, Download, ahead

_THREADS = 4  # one copies 2 to 3 GB/s to or from the system's memory of files, on a server's processor


class StateFile:
    """The states of some samples, one after the other.

    Args:
        path: of the file, or what the names of several begin with.
        samples: how many.
        layout: (shape without the samples, type) of each tensor of a state.
        threads: read and write while its caller goes on, each thread a file of its own: of one, only one at a time is
            let write.

    Attributes:
        paths: of the files.

    Raises QtoolError, here and later, when the disk is full or fails.
    """

    def __init__(
        self, path: Path, samples: int, layout: Sequence[tuple[tuple[int, ...], torch.dtype]], *, threads: bool = False
    ) -> None:
        self.samples = samples
        self._layout = list(layout)
        self._sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._layout]
        self._pinned = threads and torch.cuda.is_available()
        self._threads = _THREADS if threads else 0
        count = max(1, min(self._threads, samples))
        self.paths = [path.with_name(f"{path.name}-{number}") for number in range(count)] if threads else [path]
        self._files = [
            Activations(each, len(range(number, samples, count)), sum(self._sizes), torch.uint8, keep=True)
            for number, each in enumerate(self.paths)
        ]
        self._writing = Behind(threads=self._threads)

    def read(self, start: int, stop: int) -> State:
        """Of samples start to stop, as they were written last."""
        self._writing.wait()
        return self._read(slice(start, stop))

    def reads(self, places: Sequence[slice]) -> Iterator[State]:
        """Of the samples at these places, one after the other.

        Each is read before it is asked for, so only what is at places that were given already may be written meanwhile.
        """
        self._writing.wait()
        return ahead(self._read, places, threads=self._threads)

    def _read(self, place: slice) -> State:
        start, stop = place.start, place.stop
        rows, first, found = self._rows(start, stop), 0, []
        for (shape, dtype), size in zip(self._layout, self._sizes, strict=True):
            part = rows[:, first : first + size]
            if len(self._sizes) > 1:  # a copy: numbers must begin at a multiple of their size
                part = part.clone(memory_format=torch.contiguous_format)
            found.append(part.reshape(-1).view(dtype).reshape(stop - start, *shape))
            first += size
        return tuple(found)

    def write(self, start: int, state: State) -> None:
        """Replace the samples from start on."""
        parts = []
        for tensor, (shape, dtype) in zip(state, self._layout, strict=True):
            if tuple(tensor.shape[1:]) != shape:
                raise ValueError(f"a state of {tuple(tensor.shape[1:])} per sample where {shape} are expected")
            parts.append(tensor.detach().to(dtype))
        if parts:
            download, nbytes = Download(parts), sum(part.nbytes for part in parts)
            for number in range(len(self._files)):
                self._writing.do(partial(self._put, number, start, download), nbytes // len(self._files))

    def _put(self, number: int, start: int, download: Download) -> None:
        """What one of the files has of the samples from start on."""
        own, place = self._own(number, start)
        parts = [part.reshape(len(part), -1)[own].contiguous().view(torch.uint8) for part in download.result()]
        self._files[number].write(place, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Bytes of samples start to stop, uint8 [samples, bytes]."""
        if len(self._files) == 1 and not self._pinned:
            return self._files[0].read(start, stop)
        rows = torch.empty(stop - start, sum(self._sizes), dtype=torch.uint8, pin_memory=self._pinned)
        for number, file in enumerate(self._files):
            own, place = self._own(number, start)
            rows[own] = file.read(place, place + len(range(*own.indices(len(rows)))))
        return rows

    def _own(self, number: int, start: int) -> tuple[slice, int]:
        """Which of the samples from start on a file has, every so many one; and where in it the first of them lies."""
        count = len(self._files)
        first = (number - start) % count
        return slice(first, None, count), (start + first) // count

    def flush(self) -> None:
        """Until all is in the file. Raises what writing it did."""
        self._writing.wait()

    def close(self) -> None:
        with self._writing:
            pass
        for file in self._files:
            file.close()
