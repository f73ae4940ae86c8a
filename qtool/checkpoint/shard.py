"""One safetensors file, written as its tensors come."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import dtypes
from qtool.checkpoint.header import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from typing import BinaryIO

    import torch

_ALIGNMENT = 8
_ENTRY_BYTES = 120  # of one tensor's JSON, beside its name: dtype, shape, two offsets
_CHUNK = 1 << 22
_START = '{"__metadata__":{"format":"pt"}'


@dataclass
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    alignment: int
    offset: int


class Shard:
    """Streams tensors into `path`, behind room kept for the header, which is written last and padded with spaces.

    The format allows no gaps, yet readers need every tensor at a multiple of its element's size. So a tensor whose
    bytes aren't a multiple of 8 (a single int8, an odd matrix) waits in a file of its own and is appended at the end,
    wider elements first.
    """

    def __init__(self, path: Path, expected_tensors: int, *, room: int = 0) -> None:
        wanted = min(256 * expected_tensors + 4096, MAX_HEADER_BYTES)
        self.path = path
        self._room = room or wanted - wanted % _ALIGNMENT - 8
        self._new: list[tuple[bool, _Entry]] = []
        self.finished = False
        self._used = len(_START) + 1
        self._body: list[_Entry] = []
        self._tail: list[_Entry] = []
        self._body_bytes = 0
        self._tail_bytes = 0
        self.tail_path = path.with_suffix(".tail")
        self._file: BinaryIO = path.open("rb+" if room else "wb", buffering=0)
        self._tail_file: BinaryIO | None = None
        self._file.seek(8 + self._room)

    @classmethod
    def restore(cls, path: Path, states: list[dict[str, Any]]) -> Shard:
        """A shard as it was at the last of these `state`s; what came later is cut off.

        Raises OSError when its files don't hold all of that.
        """
        shard = cls(path, 0, room=states[0]["room"])
        for state in states:
            for in_body, entry in state["entries"]:
                restored = _Entry(**{**entry, "shape": tuple(entry["shape"])})
                shard._used += _entry_bytes(restored.name, len(restored.shape))
                (shard._body if in_body else shard._tail).append(restored)
        shard._body_bytes = sum(entry.nbytes for entry in shard._body)
        shard._tail_bytes = sum(entry.nbytes for entry in shard._tail)
        if states[-1]["finished"]:
            shard.finished = True
            shard.close()
            return shard
        end = 8 + shard._room + shard._body_bytes
        if shard._body and path.stat().st_size < end:
            raise OSError(f"{path} has become shorter")
        os.ftruncate(shard._file.fileno(), end)
        shard._file.seek(end)
        if shard._tail:
            shard._tail_file = shard.tail_path.open("rb+", buffering=0)
            os.ftruncate(shard._tail_file.fileno(), shard._tail_bytes)
            shard._tail_file.seek(shard._tail_bytes)
        else:
            shard.tail_path.unlink(missing_ok=True)
        return shard

    def state(self) -> dict[str, Any]:
        """What has been added since the last call, for `restore`."""
        entries = [(in_body, asdict(entry)) for in_body, entry in self._new]
        self._new = []
        return {"room": self._room, "finished": self.finished, "entries": entries}

    def flush(self) -> None:
        """Have all of it on the disk before going on."""
        for file in (self._file, self._tail_file):
            if file is not None and not file.closed:
                os.fsync(file.fileno())

    @property
    def nbytes(self) -> int:
        """Size of the tensors so far."""
        return self._body_bytes + self._tail_bytes

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._body + self._tail]

    def fits(self, tensors: Mapping[str, torch.Tensor], max_bytes: int) -> bool:
        """Whether the header has room for these names, and the file, of at most `max_bytes`, for these tensors."""
        used = self._used + sum(_entry_bytes(name, tensor.ndim) for name, tensor in tensors.items())
        nbytes = self.nbytes + sum(tensor.nbytes for tensor in tensors.values())
        return used <= self._room and 8 + self._room + nbytes <= max_bytes

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a contiguous tensor in main memory. Raises OSError when the disk doesn't take it."""
        import torch

        entry = _Entry(
            name,
            dtypes.from_torch(tensor.dtype),
            tuple(tensor.shape),
            tensor.nbytes,
            min(tensor.itemsize, _ALIGNMENT),
            0,
        )
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        self._used += _entry_bytes(name, tensor.ndim)
        if entry.nbytes % _ALIGNMENT == 0:
            entry.offset = self._body_bytes
            _write(self._file, content)
            self._body.append(entry)
            self._new.append((True, replace(entry)))
            self._body_bytes += entry.nbytes
        else:
            if self._tail_file is None:
                self._tail_file = self.tail_path.open("wb+", buffering=0)
            entry.offset = self._tail_bytes
            _write(self._tail_file, content)
            self._tail.append(entry)
            self._new.append((False, replace(entry)))
            self._tail_bytes += entry.nbytes

    def finish(self) -> None:
        """Append what waits, write the header, close. The tail's file stays, so that `restore` can go back."""
        end = self._body_bytes
        self._file.seek(8 + self._room + end)
        for entry in sorted(self._tail, key=lambda entry: -entry.alignment):
            assert self._tail_file is not None
            self._tail_file.seek(entry.offset)
            left = entry.nbytes
            while left:
                chunk = self._tail_file.read(min(left, _CHUNK))
                _write(self._file, memoryview(chunk))
                left -= len(chunk)
            entry.offset = end
            end += entry.nbytes
        entries = {
            entry.name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": [entry.offset, entry.offset + entry.nbytes],
            }
            for entry in self._body + self._tail
        }
        header = (_START + "," * bool(entries) + json.dumps(entries, separators=(",", ":"))[1:]).encode()
        assert len(header) <= self._room
        self._file.seek(0)
        _write(self._file, memoryview(self._room.to_bytes(8, "little") + header.ljust(self._room)))
        self.flush()
        self.close()
        self.finished = True

    def remove_tail(self) -> None:
        """Once nothing will be restored from before `finish`."""
        self.tail_path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()
        if self._tail_file is not None:
            self._tail_file.close()


def _entry_bytes(name: str, dimensions: int) -> int:
    return len(json.dumps(name)) + _ENTRY_BYTES + 20 * dimensions


def _write(file: BinaryIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
