"""The header of one safetensors file, parsed strictly.

A file is: the header's length (8 bytes, little endian), a JSON object naming every tensor's dtype, shape and
byte range, then the bytes. What is checked here needs the header and the file's size only: known dtypes,
shapes that agree with the byte ranges, ranges that neither overlap nor leave holes nor leave the file.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qtool.checkpoint.dtypes import BITS
from qtool.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LIMIT = 2**63


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is and what it is; `offset` counts from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_header(file: Path) -> list[TensorInfo]:
    """Every tensor of one safetensors file, in the order of their bytes.

    Raises:
        InputError: the file can't be read, is truncated, or breaks the format anywhere.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError("not a regular file", where=str(file))
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or 8 + length > size:
                raise _damaged(file, f"truncated: {size} bytes, its header alone needs {8 + length}")
            if length > MAX_HEADER_BYTES:
                raise _damaged(file, f"header of {length} bytes, the format allows {MAX_HEADER_BYTES}")
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(file)) from None
    if len(text) != length:
        raise _damaged(file, "truncated while it was read")
    return _tensors(file, _parse(file, text), data_start=8 + length, data_size=size - 8 - length)


def _damaged(file: Path, what: str) -> InputError:
    return InputError(
        f"not a valid safetensors file: {what}", where=str(file), hint="Download or copy this file again."
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constants(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _damaged(file, "its header is not a JSON object")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON: {error}") from None
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "__metadata__ must map names to strings")
    return header


def _tensors(file: Path, header: dict[str, Any], data_start: int, data_size: int) -> list[TensorInfo]:
    infos = [_tensor(file, name, entry, data_start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = data_start
    for info in infos:
        if info.offset != end:
            problem = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise _damaged(file, f"tensor {info.name!r} {problem}")
        end += info.nbytes
    if end != data_start + data_size:
        missing = end - data_start - data_size
        what = f"truncated: {missing} bytes are missing" if missing > 0 else f"{-missing} bytes after its last tensor"
        raise _damaged(file, what)
    return infos


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _damaged(file, f"tensor name {name!r} is not Unicode text") from None
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(file, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(file, f"tensor {name!r} has unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise _damaged(file, f"tensor {name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise _damaged(file, f"tensor {name!r} has impossible data_offsets")
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if bits >= _LIMIT:
            raise _damaged(file, f"tensor {name!r} has an impossible shape")
    nbytes = offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        raise _damaged(file, f"tensor {name!r} is {dtype} {shape}, but has {nbytes} bytes")
    return TensorInfo(name, dtype, tuple(shape), nbytes, file, data_start + offsets[0])
