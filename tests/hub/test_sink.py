"""What a client writes: hashed on the way, continued from what is there, never longer than announced."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool.hub.listing import RemoteFile
from qtool.hub.patience import StartOver, Stopped
from qtool.hub.sink import Sink

DATA = os.urandom(100_000)
ANNOUNCED = RemoteFile("m.bin", len(DATA), hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / "incomplete", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


def sink(handle: int, file: RemoteFile = ANNOUNCED, stop: threading.Event | None = None) -> tuple[Sink, list[int]]:
    moved: list[int] = []
    return Sink(handle, file, Path("m.bin"), moved.append, stop or threading.Event()), moved


def test_pieces_make_the_file(handle: int, tmp_path: Path) -> None:
    out, moved = sink(handle)
    for start in range(0, len(DATA), 33_333):
        assert not out.right
        assert out.tell() == start
        out.write(DATA[start : start + 33_333])
    assert out.right
    assert out.sha256 == ANNOUNCED.digest
    assert sum(moved) == len(DATA)
    assert (tmp_path / "incomplete").read_bytes() == DATA


@pytest.mark.parametrize("there", [0, 1, 50_000, 100_000])
def test_it_continues_from_what_is_there(handle: int, there: int) -> None:
    os.write(handle, DATA[:there])
    out, moved = sink(handle)
    assert out.tell() == there == sum(moved)
    out.write(DATA[there:])
    assert out.right


def test_what_is_there_is_not_believed(handle: int) -> None:
    os.write(handle, b"x" + DATA[1:50_000])
    out, _ = sink(handle)
    out.write(DATA[50_000:])
    assert out.whole
    assert not out.right


def test_too_much_is_not_written(handle: int, tmp_path: Path) -> None:
    os.write(handle, DATA + b"more")
    out, _ = sink(handle)
    assert out.tell() == 0
    out.write(DATA[:10])
    with pytest.raises(StartOver):
        out.write(DATA)
    assert (tmp_path / "incomplete").read_bytes() == DATA[:10]


def test_a_client_starts_over_as_huggingface_hub_does(handle: int) -> None:
    out, moved = sink(handle)
    out.write(DATA[:500])
    out.seek(max(out.tell() - 500, 0))
    out.truncate()
    assert out.tell() == 0 == sum(moved)
    out.write(DATA)
    assert out.right


def test_stopped(handle: int) -> None:
    stop = threading.Event()
    out, _ = sink(handle, stop=stop)
    stop.set()
    with pytest.raises(Stopped):
        out.write(DATA)


def test_small_files_have_the_hash_that_git_gives_them(handle: int, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(DATA)
    git = ["git", "hash-object", "--no-filters", str(tmp_path / "text")]
    name = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    out, _ = sink(handle, RemoteFile("text", len(DATA), name))
    out.write(DATA)
    assert out.right
    assert out.sha256 == hashlib.sha256(DATA).hexdigest()
