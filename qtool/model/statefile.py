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

# One copies 2 to 3 GB/s to or from the system's memory of files, on a server's processor. A file for each of them wrote
# no faster (a machine with one H200, 8.6 GB a layer): the disk took no more.
_THREADS = 4


class StateFile:
    """The states of some samples, one after the other.

    Args:
        path: of the file.
        samples: how many.
        layout: (shape without the samples, type) of each tensor of a state.
        threads: read and write while its caller goes on.

    Raises QtoolError, here and later, when the disk is full or fails.
    """

    def __init__(
        self, path: Path, samples: int, layout: Sequence[tuple[tuple[int, ...], torch.dtype]], *, threads: bool = False
    ) -> None:
        self.path, self.samples = path, samples
        self._layout = list(layout)
        self._sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._layout]
        self._rows = Activations(path, samples, sum(self._sizes), torch.uint8, keep=True, pinned=threads)
        self._threads = _THREADS if threads else 0
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
        rows, first, found = self._rows.read(start, stop), 0, []
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
            self._writing.do(partial(self._put, start, Download(parts)), sum(part.nbytes for part in parts))

    def _put(self, start: int, download: Download) -> None:
        parts = [part.reshape(len(part), -1).contiguous().view(torch.uint8) for part in download.result()]
        self._rows.write(start, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def flush(self) -> None:
        """Until all is in the file. Raises what writing it did."""
        self._writing.wait()

    def close(self) -> None:
        with self._writing:
            pass
        self._rows.close()
