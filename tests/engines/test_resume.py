"""Killed runs that are resumed, and several processes: the result is that of one undisturbed process, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks._common import tree
from tests.engines import kill_table
from tests.engines.kill_table import Undisturbed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kill_table.make_model(tmp_path_factory.mktemp("models") / "model", layers=3)


@pytest.fixture(scope="module")
def normal(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return kill_table.undisturbed(model, tmp_path_factory.mktemp("normal") / "run")


def test_killed_runs_are_resumed_to_the_same_files(model: Path, normal: Undisturbed, tmp_path: Path) -> None:
    rng = random.Random(3)
    strikes = []
    for number in range(3):
        struck, outcome = kill_table.strike(model, tmp_path / str(number), normal, rng)
        assert outcome == "identical", struck
        strikes += struck
    assert any(strike.units for strike in strikes), "every kill came before the first unit was finished"


@pytest.mark.parametrize("options", [("--workers", "2"), ("--ray", "local"), ("--memory", "1GB")])
def test_however_it_runs_it_makes_the_same_files(
    model: Path, normal: Undisturbed, run_qtool: Callable[..., Any], tmp_path: Path, options: tuple[str, str]
) -> None:
    done = run_qtool("quantize", model, "-o", tmp_path / "out", *kill_table.SIZE, *options)
    assert done.code == 0, done.stderr
    assert kill_table.digests(tmp_path / "out") == normal.files
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_killed_ray_worker_changes_nothing(model: Path, normal: Undisturbed, tmp_path: Path) -> None:
    process = kill_table.start(model, tmp_path / "out", "--ray", "local")
    killed = False
    while process.poll() is None and not killed:
        for pid in tree(process.pid):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_run"):  # named by what it is doing
                    os.kill(pid, signal.SIGKILL)
                    killed = True
                    break
        time.sleep(0.005)
    _, said = process.communicate()
    assert killed
    assert process.returncode == 0, said
    assert kill_table.digests(tmp_path / "out") == normal.files


def test_layers_without_experts_go_on_while_those_before_them_are_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    normal = kill_table.undisturbed(tiny_llama, tmp_path / "normal")
    found = kill_table.undisturbed(tiny_llama, tmp_path / "workers", "--workers", "2")
    assert found.files == normal.files
    struck, outcome = kill_table.strike(tiny_llama, tmp_path / "killed", normal, random.Random(1), ("--workers", "2"))
    assert outcome == "identical", struck
