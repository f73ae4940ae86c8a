"""A job that ended in any way goes on where its journal says."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint import formats, journal
from qtool.checkpoint.journal import FILE, Journal
from qtool.checkpoint.writer import CheckpointWriter, Resume, Sharding
from qtool.errors import InputError, QtoolError

TENSORS = 12
RENAMES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class Ended(Exception):
    pass


def write(output: Path, *, end_after: int = TENSORS + 1, unfinished: int = 0, resume: bool = False) -> list[int]:
    """Write tensors of odd and even sizes, one record each; returns the records that were there already."""
    with CheckpointWriter(
        output, formats.PLAIN, sharding=Sharding(12_000, 16), resume=Resume("a", wanted=resume)
    ) as writer:
        done = [record["number"] for record in writer.records]
        for number in range(len(done), TENSORS):
            generator = torch.Generator().manual_seed(number)
            size = 1000 + number % 3
            writer.add(f"t{number}", torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator))
            writer.add(f"u{number}", torch.randn(400, generator=generator))
            writer.mark({"number": number})
            if number + 1 == end_after:
                for i in range(unfinished):
                    writer.add(f"lost{i}", torch.ones(1001, dtype=torch.int8))
                raise Ended
        writer.finish(None, {}, {})
    return done


def write_one(output: Path, error: Exception) -> None:
    with CheckpointWriter(output, formats.PLAIN, resume=Resume("a")) as writer:
        writer.add("t", torch.ones(3))
        writer.mark({"number": 0})
        raise error


@pytest.mark.parametrize("end_after", range(1, TENSORS))
@pytest.mark.parametrize("unfinished", [0, 1, 15])
def test_going_on_gives_the_same_bytes(tmp_path: Path, end_after: int, unfinished: int) -> None:
    write(tmp_path / "whole")
    with pytest.raises(Ended):
        write(tmp_path / "m", end_after=end_after, unfinished=unfinished)
    assert not (tmp_path / "m").exists()
    assert write(tmp_path / "m", resume=True) == list(range(end_after))
    assert files(tmp_path / "m") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "whole"]


def test_without_resume_it_starts_over(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        write(tmp_path / "m", end_after=5)
    assert write(tmp_path / "m") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_nothing_to_resume_is_a_fresh_start(tmp_path: Path) -> None:
    assert write(tmp_path / "m", resume=True) == []


def test_another_job_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        write(tmp_path / "m", end_after=5)
    with pytest.raises(InputError, match="earlier run used another"):
        CheckpointWriter(tmp_path / "m", formats.PLAIN, resume=Resume("b", wanted=True))
    assert write(tmp_path / "m", resume=True) == list(range(5))


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_one(tmp_path / "m", InputError("damaged"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(QtoolError):
        write_one(tmp_path / "m", QtoolError("no space left"))
    resumed = CheckpointWriter(tmp_path / "m", formats.PLAIN, resume=Resume("a", wanted=True))
    with resumed as writer:
        assert writer.records == [{"number": 0}]
        assert "t" in writer


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        write(tmp_path / "m", end_after=4)
    (folder,) = tmp_path.iterdir()
    with (folder / FILE).open("ab") as file:
        file.write(b'{"entry": {"record"')
    assert write(tmp_path / "m", resume=True) == list(range(4))


def test_after_a_reboot_only_what_was_synced_counts(tmp_path: Path) -> None:
    log = Journal(tmp_path, "a", [])
    log.append({"n": 1})
    log.synced()
    log.append({"n": 2})
    log.close()
    assert journal.read(tmp_path) == ("a", [{"n": 1}, {"n": 2}])
    lines = (tmp_path / FILE).read_text().splitlines()
    first = json.loads(lines[0]) | {"boot": "before"}
    (tmp_path / FILE).write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert journal.read(tmp_path) == ("a", [{"n": 1}])


def killed_at(step: int, output: Path) -> bool:
    """Go on in a process of its own, until its so many-th operation on a file's name; False if it came to its end."""
    child = os.fork()
    if not child:
        left = step

        def strike(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event in RENAMES or (event == "open" and str(args[0]).startswith(str(output.parent))):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        with suppress(BaseException):
            write(output, resume=True)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_process_that_ended_in_finish(tmp_path: Path) -> None:
    """Between any two operations on files of a run that has only to finish, another one can take over."""
    write(tmp_path / "whole")
    with pytest.raises(Ended):
        write(tmp_path / "m", end_after=TENSORS)
    (left,) = tmp_path.glob(".m.partial-*")
    assert len([*left.glob("shard-*.tail")]) > 1
    for step in itertools.count(1):
        output = tmp_path / "case" / "m"
        shutil.copytree(left, output.parent / left.name)
        killed = killed_at(step, output)
        if output.exists():  # only its journal may still be in it
            with pytest.raises(InputError, match="exists already"):
                write(output, resume=True)
        else:
            assert write(output, resume=True) == list(range(TENSORS))
        assert files(output) == files(tmp_path / "whole")
        assert [path.name for path in output.parent.iterdir()] == ["m"]
        shutil.rmtree(output.parent)
        if not killed:
            break
    assert step > 20


class Intruder(dict[str, Any]):
    """A config.json that somebody makes a folder at the output path before, once it is looked at."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def items(self) -> Any:
        self.output.mkdir()
        (self.output / "theirs").write_text("")
        return super().items()


@pytest.mark.parametrize("late", [False, True])
def test_an_output_that_comes_into_being_meanwhile_costs_nothing(tmp_path: Path, late: bool) -> None:
    def race() -> None:
        with CheckpointWriter(tmp_path / "m", formats.PLAIN, resume=Resume("a")) as writer:
            writer.add("t", torch.ones(3))
            writer.mark({"number": 0})
            intruder = Intruder(tmp_path / "m")
            if not late:
                intruder.items()
            writer.finish(None, intruder if late else {}, {})

    with pytest.raises(InputError, match="was made by another process" if late else "exists already") as caught:
        race()
    assert "--resume" in str(caught.value.hint)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["theirs"]
    shutil.rmtree(tmp_path / "m")
    with CheckpointWriter(tmp_path / "m", formats.PLAIN, resume=Resume("a", wanted=True)) as writer:
        assert writer.records == [{"number": 0}]
        writer.finish(None, {}, {})
    assert load_file(tmp_path / "m" / "model.safetensors")["t"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_two_at_once_do_not_do_the_work_twice(tmp_path: Path, wanted: bool, marked: bool) -> None:
    with CheckpointWriter(tmp_path / "m", formats.PLAIN, resume=Resume("a")) as first:
        if marked:
            first.mark({})
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="another process is writing this output"):
            CheckpointWriter(tmp_path / "m", formats.PLAIN, resume=Resume("a", wanted=wanted))
        assert sorted(tmp_path.rglob("*")) == before
        CheckpointWriter(tmp_path / "n", formats.PLAIN, resume=Resume("a", wanted=wanted)).__exit__(None, None, None)
