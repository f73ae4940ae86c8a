"""Commands whose standard streams are closed, full or gone, or whose folder is; from a shell, as it happens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def shell(qtool_environment: dict[str, str], tmp_path: Path) -> Shell:
    """shell(line, *arguments): runs a line in which "$@" is `qtool ARGUMENTS`."""

    def run(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", line, "bash", sys.executable, "-m", "qtool", *map(str, arguments)]
        return subprocess.run(command, env=qtool_environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_closed_output_is_refused_before_any_work(shell: Shell, tiny_llama: Path, tmp_path: Path) -> None:
    done = shell('"$@" >&-', "convert", tiny_llama, "--to", "modelslim", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: is closed\n  at: standard output\n")
    assert not (tmp_path / "out").exists()


def test_closed_input_is_empty_input(shell: Shell) -> None:
    done = shell('"$@" <&-', "inspect", "-")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no path on standard input" in done.stderr
    done = shell('"$@" <&-', "recipes", "list")
    assert (done.returncode, done.stderr) == (0, "")


def test_input_that_cannot_be_read(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    done = shell('"$@" < bytes', "inspect", "-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "bug" not in done.stderr


@pytest.mark.parametrize("end", ["2>&-", "2>/dev/full", "2> >(exec 0<&-; sleep 0.1)", "2>&- <&-"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("recipes", "show", "none-of-this-name"), 2), (("recipes", "show", "--none-of-this-name"), 2),
        (("inspect", "-"), 2), (("recipes", "show", "default"), 0), (("generate", "/", "-p", "x"), 2),
    ],
)  # fmt: skip
def test_errors_that_nobody_can_read(shell: Shell, arguments: tuple[str, ...], code: int, end: str) -> None:
    """They are not put among the results, and the exit code still tells."""
    done = shell(f'"$@" {end}', *arguments)
    assert done.returncode == code
    assert bool(done.stdout) is (code == 0)


def test_all_closed(shell: Shell) -> None:
    assert shell('"$@" <&- >&- 2>&-', "recipes", "list").returncode == 2


def test_a_file_does_not_take_the_place_of_a_stream(shell: Shell, tmp_path: Path) -> None:
    """What is opened first gets the lowest number that is free: text for standard error would end up in it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    done = shell('"$@" 2>&-', "generate", tmp_path, prompts, "-o", tmp_path / "answers.jsonl")
    assert done.returncode == 2
    assert prompts.read_text() == "one\n"
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_folder_that_is_gone(shell: Shell) -> None:
    done = shell('mkdir gone; cd gone; rmdir ../gone; "$@"', "recipes", "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: can't be used: No such file or directory\n  at: the current folder\n")
