"""What files hold, said by SHA-256: the ground on which a finished stage is recognised."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qtool.checkpoint.companions import companions
from qtool.checkpoint.reader import REPORT, Checkpoint
from qtool.errors import QtoolError

Files = dict[str, str]
"""SHA-256 in hex, by path relative to some folder."""

_THREADS = 4
_BLOCK = 1 << 20
_VOLATILE = (REPORT,)  # says how long it took


def digest(value: Any) -> str:
    """SHA-256 of anything JSON can say, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_output(output: Path, progress: Callable[[int, int], None]) -> Files:
    """Every file of a folder, or of a single file ("."). Raises QtoolError when one can't be read."""
    if output.is_file():
        return of_files(output.parent, [output.name], progress)
    paths = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    return of_files(output, paths, progress)


def of_model(folder: Path, progress: Callable[[int, int], None]) -> Files:
    """What makes a checkpoint: config.json, tokenizer and the like, indexes and weights.

    Raises:
        InputError: no checkpoint, or a damaged one. QtoolError: a file can't be read.
    """
    checkpoint = Checkpoint.open(folder)
    paths = {"config.json", *(path.as_posix() for path in companions(checkpoint, code=True))}
    paths |= {path.name for path in folder.glob("*.json") if path.name not in _VOLATILE}
    paths |= {checkpoint.info(name).file.name for name in checkpoint.names}
    return of_files(folder, sorted(paths), progress)


def of_files(folder: Path, paths: Iterable[str], progress: Callable[[int, int], None]) -> Files:
    """These files of a folder, those that are missing left out; several at a time.

    `progress` is called with bytes done and in all. Raises QtoolError when a file can't be read.
    """
    there = [path for path in paths if (folder / path).is_file()]
    total = sum((folder / path).stat().st_size for path in there)
    done = 0
    found: Files = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, hexdigest, size in pool.map(lambda path: _hash(folder, path), there):
            found[path] = hexdigest
            done += size
            progress(done, total)
    return found


def _hash(folder: Path, path: str) -> tuple[str, str, int]:
    hasher, size = hashlib.sha256(), 0
    try:
        with (folder / path).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while block := file.read(_BLOCK):
                hasher.update(block)
                size += len(block)
    except OSError as error:
        raise QtoolError(f"can't be read: {error.strerror}", where=str(folder / path)) from None
    return path, hasher.hexdigest(), size


def together(files: Mapping[str, str]) -> str:
    """One digest of many files, but for those that say how long something took."""
    return digest({path: sha256 for path, sha256 in files.items() if path not in _VOLATILE})
