"""Killed runs that are resumed, and several processes: the result is that of one undisturbed process, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    for number in range(5):
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
