"""Locks between processes, and on file systems that have none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qtool import locks

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
HOLD = """
import sys
from pathlib import Path
from qtool import locks
handle = locks.open_folder(Path(sys.argv[1]))
print(locks.lock(handle), flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `folder` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_process_has_it(tmp_path: Path) -> None:
    handle = locks.open_folder(tmp_path)
    with holder(tmp_path) as other:
        assert locks.attempt(handle) is locks.Lock.TAKEN
        assert not locks.lock(handle)
        with locks.abandoned(tmp_path) as sure:
            assert not sure
        other.kill()
        other.wait()
        with locks.abandoned(tmp_path) as sure:
            assert sure
        assert locks.attempt(handle) is locks.Lock.OURS
    os.close(handle)


def test_waiting_is_told_once(tmp_path: Path) -> None:
    told: list[float] = []
    with holder(tmp_path) as other, (tmp_path / "x").open("w") as free:
        locks.wait(free, lambda: told.append(0))
        assert told == []
        handle = locks.open_folder(tmp_path)
        threading.Timer(0.5, other.kill).start()
        locks.wait(handle, lambda: told.append(time.monotonic()))
        assert len(told) == 1
        assert locks.attempt(handle) is locks.Lock.OURS
        os.close(handle)


def test_what_is_not_there_is_not_abandoned(tmp_path: Path) -> None:
    with locks.abandoned(tmp_path / "none") as sure:
        assert not sure


def test_a_name_that_means_something_else_now(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    handle = locks.open_folder(folder)
    assert locks.is_still(handle, folder)
    folder.rename(tmp_path / "b")
    assert not locks.is_still(handle, folder)
    folder.mkdir()
    assert not locks.is_still(handle, folder)
    os.close(handle)


WITHOUT = """
import json, os, subprocess, sys
from pathlib import Path
from qtool import files, locks
from qtool.checkpoint.storage import PartialFolder, tidy
from qtool.checkpoint.journal import Journal
from qtool.environments import store
from qtool.hub import storage
from qtool.jobs import stages
from qtool.runtimes.answers import Answers

place = Path(sys.argv[1])
handle = locks.open_folder(place)
assert locks.attempt(handle) is locks.Lock.UNKNOWN
assert locks.lock(handle)
locks.wait(handle, lambda: sys.exit("waits"))

# everyone goes on as if alone
with storage.locked(place / ".model.partial", lambda: sys.exit("waits")):
    pass
os.environ["QTOOL_ENVIRONMENTS"] = str(place / "environments")
with store.locked("vllm", lambda: sys.exit("waits")):
    pass
with stages.opened(place / "job", print, print):
    pass
with Answers(place / "answers.jsonl", {}) as answers:
    answers.write({"text": "a"})
files.write_text(place / "file", "content")
assert (place / "file").read_text() == "content"

# what is left of another writer can be gone on with, but is never taken for rubbish
folder = PartialFolder.make(place / "model")
Journal(folder.path, "key", []).append({"record": 1})
folder.leave()
assert tidy(place / "model") is None
found = PartialFolder.resume(place / "model", "key")
assert found is not None and found[1] == [{"record": 1}]
found[0].discard()
print("fine")
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, number: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT)
    command = [sys.executable, str(ROOT / "tests/nolocks.py"), str(number), str(script), str(tmp_path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
