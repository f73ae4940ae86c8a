"""Stages of a job: what is done again and what is kept, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError, QtoolError
from qtool.jobs.stages import STATE, Job, opened


class Chain:
    """first -> second -> third, each the one before it with a letter more; remembers what it made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.said: list[str] = []

    def run(self, start: str = "", version: int = 1, last: str = "c") -> list[bool]:
        """Whether each stage was kept."""
        self.made, self.said = [], []
        with opened(self.folder, self.said.append, lambda *_: None) as job:
            first = job.stage("first", "one", {"start": start}, self.folder_with("first", start + "a"))
            text = (self.folder / "one" / "text").read_text()
            inputs = {"input": first.digest, "version": version}
            second = job.stage("second", "two.txt", inputs, self.file_with("second", text + "b"))
            text = (self.folder / "two.txt").read_text()
            job.stage(
                "third", "three.txt", {"input": second.digest, "last": last}, self.file_with("third", text + last)
            )
            return [done.kept for done in job.done]

    def folder_with(self, name: str, text: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            assert not path.exists()
            self.made.append(name)
            path.mkdir()
            (path / "text").write_text(text)
            (path / "qtool.json").write_text(json.dumps({"seconds": time.perf_counter()}))

        return make

    def file_with(self, name: str, text: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            assert not path.exists()
            self.made.append(name)
            path.write_text(text)

        return make


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "job")


def test_a_second_run_does_nothing(chain: Chain) -> None:
    assert chain.run() == [False, False, False]
    assert chain.made == ["first", "second", "third"]
    assert (chain.folder / "three.txt").read_text() == "abc"
    before = {path: path.stat().st_mtime_ns for path in chain.folder.rglob("*")}
    assert chain.run() == [True, True, True]
    assert chain.made == []
    assert {path: path.stat().st_mtime_ns for path in chain.folder.rglob("*")} == before


def test_times_count_for_nothing(chain: Chain) -> None:
    chain.run()
    for number, path in enumerate(chain.folder.rglob("*")):
        os.utime(path, (number, 4_000_000_000 - number))
    assert chain.run() == [True, True, True]


def test_only_what_depends_on_a_change_is_done(chain: Chain) -> None:
    chain.run()
    assert chain.run(last="d") == [True, True, False]
    assert (chain.folder / "three.txt").read_text() == "abd"
    assert chain.run(start="x") == [False, False, False]
    assert (chain.folder / "three.txt").read_text() == "xabc"
    # Another version of the second stage that makes the same: the third has the inputs that it had.
    assert chain.run(start="x", version=2) == [True, False, True]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "folder"])
def test_damage_is_noticed_and_mended(chain: Chain, damage: str) -> None:
    chain.run()
    file = chain.folder / "one" / "text"
    status = file.stat()
    if damage == "flip":
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    elif damage == "truncate":
        file.write_bytes(b"")
    elif damage == "delete":
        file.unlink()
    else:
        (chain.folder / "one").rename(chain.folder / "elsewhere")
    assert chain.run() == [False, True, True]
    assert file.read_text() == "a"
    assert (chain.folder / "three.txt").read_text() == "abc"


def test_what_somebody_put_there_is_left_alone(chain: Chain) -> None:
    chain.run()
    (chain.folder / "one" / "notes.txt").write_text("mine")
    (chain.folder / "notes.txt").write_text("mine")
    assert chain.run() == [True, True, True]
    assert chain.run(last="d") == [True, True, False]
    assert (chain.folder / "one" / "notes.txt").read_text() == (chain.folder / "notes.txt").read_text() == "mine"


def test_an_output_with_another_name_replaces_the_old_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with opened(tmp_path, lambda _: None, lambda *_: None) as job:
            job.stage("stage", name, {}, lambda path: path.write_text("x"))
    assert {path.name for path in tmp_path.iterdir()} == {"new", STATE}


def test_a_failure_keeps_what_was_done_before_it(chain: Chain) -> None:
    def fail(path: Path) -> None:
        raise QtoolError("no luck")

    with opened(chain.folder, lambda _: None, lambda *_: None) as job:
        job.stage("first", "one", {"start": ""}, chain.folder_with("first", "a"))
        with pytest.raises(QtoolError, match="no luck"):
            job.stage("second", "two.txt", {}, fail)
    assert chain.run() == [True, False, False]


def test_what_was_complete_when_the_record_was_cut_off_is_taken(chain: Chain) -> None:
    """An output comes into being complete, after the record of its beginning: no need to make it again."""
    chain.run()
    state = json.loads((chain.folder / STATE).read_text())
    for key in ("files", "seconds"):
        del state["stages"]["second"][key]
    (chain.folder / STATE).write_text(json.dumps(state))
    assert chain.run() == [True, True, True]
    assert "files" in json.loads((chain.folder / STATE).read_text())["stages"]["second"]


def test_repair_keeps_what_is_right(tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch(path: Path) -> None:
        path.mkdir(exist_ok=True)
        for name in ("a", "b"):
            if not (path / name).exists():
                fetched.append(name)
                (path / name).write_text(name)

    def run() -> None:
        with opened(tmp_path, lambda _: None, lambda *_: None) as job:
            job.stage("download", "model", {}, fetch, repair=True)

    run()
    (tmp_path / "model" / "b").write_text("x")
    run()
    assert fetched == ["a", "b", "b"]
    assert (tmp_path / "model" / "b").read_text() == "b"
    # killed in the middle of a repair: a file is gone already, and the record has no files
    (tmp_path / "model" / "b").unlink()
    state = json.loads((tmp_path / STATE).read_text())
    del state["stages"]["download"]["files"]
    (tmp_path / STATE).write_text(json.dumps(state))
    run()
    assert (tmp_path / "model" / "b").read_text() == "b"


@pytest.mark.parametrize("content", ["[1]", '{"stages": 1}', '{"stages": {"first": 1}}', '{"stages": {"first": {}}}'])
def test_a_state_file_that_makes_no_sense_costs_a_run_at_most(chain: Chain, content: str) -> None:
    chain.run()
    (chain.folder / STATE).write_text(content)
    if content == "[1]":
        with pytest.raises(InputError, match="JSON object"):
            chain.run()
    else:
        assert chain.run() == [False, False, False]


@pytest.mark.parametrize("output", ["../precious", "..", ".", "", "/"])
def test_a_state_file_cannot_point_outside(chain: Chain, tmp_path: Path, output: str) -> None:
    (tmp_path / "precious").write_text("mine")
    chain.run()
    state = json.loads((chain.folder / STATE).read_text())
    state["stages"]["second"] |= {"output": output, "key": "other"}
    (chain.folder / STATE).write_text(json.dumps(state))
    chain.run()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="not the folder of a job"), opened(folder, print, print):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_killed_before_the_first_record_was_in_place(chain: Chain) -> None:
    chain.folder.mkdir(exist_ok=True)
    draft = chain.folder / f".{STATE}.new"
    draft.write_text('{"qtool": "0.')
    chain.run()
    assert not draft.exists()
    assert (chain.folder / STATE).exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        opened(tmp_path, print, print),
        pytest.raises(QtoolError, match="another qtool run"),
        opened(tmp_path, print, print),
    ):
        pass
    with opened(tmp_path, print, print) as job:
        assert isinstance(job, Job)


KILLED = """
import sys, time
from pathlib import Path
from qtool.jobs.stages import opened

def make(path):
    text = path.name * 1000
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    time.sleep(0.01)
    with open(sys.argv[2], "a") as log:
        log.write(path.name + "\\n")
    new.replace(path)

with opened(Path(sys.argv[1]), lambda _: None, lambda *_: None) as job:
    before = ""
    for number in range(10):
        before = job.stage(f"stage {number}", f"{number}.txt", {"before": before}, make).digest
"""


def test_kill_9_at_any_moment(tmp_path: Path, qtool_environment: dict[str, Any]) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "job"), str(tmp_path / "log")]
    delay, kills = 0.05, 0
    while True:
        process = subprocess.Popen(command, env=qtool_environment)
        try:
            assert process.wait(delay) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            delay += 0.03
            assert kills < 500
    assert kills > 0
    for number in range(10):
        assert (tmp_path / "job" / f"{number}.txt").read_text() == f"{number}.txt" * 1000
    made = (tmp_path / "log").read_text().split()
    # What is there is complete: a stage is made twice only if a kill struck between its line in the log and its rename
    assert len(made) <= 10 + kills
    assert sorted(set(made)) == [f"{number}.txt" for number in range(10)]
