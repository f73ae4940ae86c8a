"""The lengths in a GGUF file's header, before the gguf library believes them: it would read beyond the end for ever.

The layout is that of versions 2 and 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
_DEEPEST = 4


def check_lengths(source: Path) -> None:
    """Raises ValueError for a length that leads out of the file, or a type that there is not."""
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).over_all()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._place = data, 4
        self._order = "<"
        if len(data) >= 8 and not int.from_bytes(data[4:8], "little") & 0xFFFF:
            self._order = ">"  # written on a machine of the other kind

    def over_all(self) -> None:
        self._number("I")  # version
        tensors, values = self._number("Q"), self._number("Q")
        self._room_for(24 * tensors + 13 * values)  # what each takes at least
        for _ in range(values):
            self._skip(self._number("Q"))
            self._value(self._number("I"), 0)
        for _ in range(tensors):
            self._skip(self._number("Q"))
            self._skip(8 * self._number("I") + 12)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            self._skip(_WIDTHS[kind])
        elif kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self._number("I"), self._number("Q")
            if inner in _WIDTHS:
                self._skip(_WIDTHS[inner] * count)
                return
            self._room_for(8 * count)
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            raise ValueError(f"no value is of type {kind}")

    def _number(self, kind: str) -> int:
        width = struct.calcsize(f"<{kind}")
        self._room_for(width)
        (number,) = struct.unpack_from(self._order + kind, self._data, self._place)
        self._place += width
        return int(number)

    def _skip(self, count: int) -> None:
        self._room_for(count)
        self._place += count

    def _room_for(self, count: int) -> None:
        if count > len(self._data) - self._place:
            raise ValueError("a length in its header leads out of the file")
