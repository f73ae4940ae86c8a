"""A supervised command leaves nothing running, however the call or the caller ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtool.workers import commands

# a command with a child of its own, which outlives the command that started it unless something ends it
NEST = "sh -c 'sleep 1000 & echo $! > {file}; echo started; wait'"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_lines_and_exit_code() -> None:
    lines: list[str] = []
    command = ["sh", "-c", "echo one; echo 'two é' >&2; printf '\\377x\\n'; read line; echo \"[$line]\"; exit 7"]
    assert commands.run(command, on_line=lines.append) == 7
    assert lines == ["one", "two é", "�x", "[]"]


def test_variables_and_descriptors(tmp_path: Path) -> None:
    lines: list[str] = []
    with (tmp_path / "file").open("w") as handle:
        code = f"import os; print(os.environ['QTOOL_A']); os.write({handle.fileno()}, b'written')"
        command = [sys.executable, "-c", code]
        assert commands.run(command, on_line=lines.append, env={"QTOOL_A": "b"}, inherit=[handle.fileno()]) == 0
    assert lines == ["b"]
    assert (tmp_path / "file").read_text() == "written"


def test_a_command_that_is_none_or_dies() -> None:
    lines: list[str] = []
    assert commands.run(["/no/such/program"], on_line=lines.append) == 127
    assert "/no/such/program" in lines[0]
    assert commands.run(["sh", "-c", "kill -9 $$"], on_line=lines.append) == 1
    assert "killed by signal 9" in lines[-1]


def test_what_a_callback_raises_ends_everything(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(line: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        commands.run(["sh", "-c", NEST.format(file=tmp_path / "pid")], on_line=stop)
    assert gone(int((tmp_path / "pid").read_text()))


def test_ticks_come_while_the_command_is_silent() -> None:
    ticks: list[None] = []
    assert commands.run(["sleep", "1.5"], on_line=print, on_tick=lambda: ticks.append(None)) == 0
    assert ticks


def test_nothing_survives_a_killed_parent(tmp_path: Path) -> None:
    code = "import sys; from qtool.workers import commands; commands.run(sys.argv[1:], on_line=print)"
    root = str(Path(commands.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-u", "-c", code, "sh", "-c", NEST.format(file=tmp_path / "pid")],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    parent.kill()
    parent.wait()
    assert gone(pid)
