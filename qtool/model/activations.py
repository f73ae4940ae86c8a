"""Activations of all calibration tokens, on disk, read and written a few rows at a time.

Plain reads and writes, no mapping: what lies in the kernel's page cache is not this process's memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from qtool.errors import QtoolError
from qtool.files import disk_errors


class Activations:
    """A matrix [rows, width] in a file.

    Args:
        path: of the file.
        rows, width: its shape.
        dtype: of its elements.
        keep: what an existing file holds; else it begins as zeros.
        pinned: read into memory that CUDA copies from while something else goes on, where there is CUDA.

    Raises QtoolError, here and later, when the disk is full or fails.
    """

    def __init__(
        self, path: Path, rows: int, width: int, dtype: torch.dtype, *, keep: bool = False, pinned: bool = False
    ) -> None:
        self.path = path
        self.rows, self.width, self.dtype = rows, width, dtype
        self._row_bytes = width * dtype.itemsize
        self._pinned = pinned and torch.cuda.is_available()
        self._file = -1
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC), 0o600)
            os.ftruncate(self._file, rows * self._row_bytes)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop."""
        return self._fill([(start, stop - start)], stop - start)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by their numbers, int64 [n]; fastest when ascending."""
        return self._fill(_runs(rows), len(rows))

    def write(self, start: int, tensor: torch.Tensor) -> None:
        """Replace the rows from start on by tensor [n, width]."""
        self._pour([(start, len(tensor))], tensor)

    def scatter(self, rows: torch.Tensor, tensor: torch.Tensor) -> None:
        """Replace the rows of these numbers, int64 [n], by tensor [n, width]."""
        self._pour(_runs(rows), tensor)

    def add(self, rows: torch.Tensor, tensor: torch.Tensor) -> None:
        """Add tensor [n, width] to the rows of these numbers, int64 [n], each of which comes once."""
        self.scatter(rows, self.gather(rows) + tensor)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Activations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _fill(self, runs: list[tuple[int, int]], count: int) -> torch.Tensor:
        out = torch.empty(count * self._row_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        buffer = out.numpy().data
        for first, length in runs:
            place, end = first * self._row_bytes, (first + length) * self._row_bytes
            while place < end:
                try:
                    got = os.preadv(self._file, [buffer[: end - place]], place)
                except OSError as error:
                    raise QtoolError(f"can't be read any more: {error.strerror}", where=str(self.path)) from error
                if not got:
                    raise QtoolError("has become shorter", where=str(self.path))
                buffer, place = buffer[got:], place + got
        return out.view(self.dtype).reshape(count, self.width)

    def _pour(self, runs: list[tuple[int, int]], tensor: torch.Tensor) -> None:
        if tensor.shape != (sum(length for _, length in runs), self.width):
            raise ValueError(f"{tuple(tensor.shape)} can't go into rows of {self.width}")
        content = tensor.detach().to(self.dtype).cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data
        with disk_errors(self.path, content.nbytes):
            for first, length in runs:
                place, end = first * self._row_bytes, (first + length) * self._row_bytes
                while place < end:
                    put = os.pwritev(self._file, [content[: end - place]], place)
                    content, place = content[put:], place + put


class Resident:
    """The same matrix in the memory of a device, which it is read to and written from.

    Raises torch.OutOfMemoryError, as everything on a device does.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self._matrix = torch.zeros(rows, width, dtype=dtype, device=device)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._matrix[start:stop]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self._matrix.index_select(0, rows.to(self._matrix.device))

    def write(self, start: int, tensor: torch.Tensor) -> None:
        self._matrix[start : start + len(tensor)] = tensor

    def add(self, rows: torch.Tensor, tensor: torch.Tensor) -> None:
        device = self._matrix.device
        self._matrix.index_add_(0, rows.to(device), tensor.to(device))

    def remove(self) -> None:
        self._matrix = self._matrix[:0].clone()

    def __enter__(self) -> Resident:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _runs(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, how many)."""
    numbers = rows.tolist()
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
