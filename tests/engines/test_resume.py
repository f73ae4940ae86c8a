"""Killed runs that are resumed, and several processes: the result is that of one undisturbed process, byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint import storage
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob, Resources
from qtool.errors import InputError, QtoolError
from qtool.recipe.load import load
from tests.benchmarks._common import tree
from tests.engines import kill_table
from tests.engines.conftest import Quiet
from tests.engines.kill_table import Undisturbed

pytestmark = pytest.mark.slow


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


def test_killed_runs_of_high_effort_are_resumed_to_the_same_files(model: Path, tmp_path: Path) -> None:
    high, rng = ("--effort", "high"), random.Random(5)
    normal = kill_table.undisturbed(model, tmp_path / "normal", *high)
    for number in range(2):
        struck, outcome = kill_table.strike(model, tmp_path / str(number), normal, rng, high)
        assert outcome == "identical", struck


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


class Struck(Quiet):
    """A report that has something happen as soon as so many layers are finished."""

    def __init__(self, layers: int, happen: Callable[[], object]) -> None:
        super().__init__()
        self._layers, self._happen = layers, happen

    def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
        super().progress(stage, done, total, unit)
        if done == self._layers:
            self._happen()


def job_here(model: Path, output: Path, *, resume: bool = False, **resources: Any) -> QuantizationJob:
    return QuantizationJob(
        model=model,
        output=OutputFolder(output, "compressed-tensors", resume=resume),
        recipe=load("default"),
        scheme="w8a8",
        calibration=CalibrationText("builtin", 4, 32),
        device="cpu",
        resources=Resources(**resources),
    )


def quantize_here(model: Path, output: Path, report: Any, *, resume: bool = False, **resources: Any) -> None:
    from qtool.engines.native.execute import execute
    from qtool.engines.native.prepare import prepare

    execute(prepare(job_here(model, output, resume=resume, **resources), report), report)


def test_a_disk_that_fails_for_a_while_costs_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights, there = model / "model.safetensors", model / "there"

    def unplug() -> None:
        weights.rename(there)
        weights.symlink_to("/proc/self/mem")  # where nothing is mapped, reading it is an input/output error

    quantize_here(model, tmp_path / "normal", Quiet())
    with pytest.raises(QtoolError, match="Input/output error"):
        quantize_here(model, tmp_path / "out", Struck(1, unplug))
    there.replace(weights)
    resumed = Quiet()
    quantize_here(model, tmp_path / "out", resumed, resume=True)
    assert resumed.steps[0] == (1, 2)
    assert kill_table.digests(tmp_path / "out") == kill_table.digests(tmp_path / "normal")


def test_a_run_that_could_not_finish_has_only_that_to_do(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_here(tiny_llama, tmp_path / "normal", Quiet())
    with pytest.raises(InputError, match="exists already"):
        quantize_here(tiny_llama, tmp_path / "out", Struck(2, (tmp_path / "out").mkdir))
    (tmp_path / "out").rmdir()
    resumed = Quiet()
    quantize_here(tiny_llama, tmp_path / "out", resumed, resume=True)
    assert resumed.steps == [(2, 2)]
    assert kill_table.digests(tmp_path / "out") == kill_table.digests(tmp_path / "normal")


def test_options_that_exclude_each_other_do_not_cost_what_they_would_resume(tiny_llama: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise QtoolError("struck")

    with pytest.raises(QtoolError, match="struck"):
        quantize_here(tiny_llama, tmp_path / "out", Struck(1, fail))
    with pytest.raises(InputError, match="exclude"):
        quantize_here(tiny_llama, tmp_path / "out", Quiet(), resume=True, workers=1, ray="local")
    resumed = Quiet()
    quantize_here(tiny_llama, tmp_path / "out", resumed, resume=True)
    assert resumed.steps[0] == (1, 2)


def test_resuming_asks_for_no_more_space_than_it_takes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise QtoolError("struck")

    from qtool.engines.native.prepare import prepare

    quiet: Any = Quiet()
    plan = prepare(job_here(tiny_llama, tmp_path / "out"), quiet).dry_run()
    assert plan.resources is not None
    with pytest.raises(QtoolError, match="struck"):
        quantize_here(tiny_llama, tmp_path / "out", Struck(1, fail))
    free = plan.output_bytes + plan.resources.scratch_bytes - 50_000
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2 * free, free, free))
    with pytest.raises(QtoolError, match="are free"):
        quantize_here(tiny_llama, tmp_path / "another", Quiet())
    resumed = Quiet()
    quantize_here(tiny_llama, tmp_path / "out", resumed, resume=True)
    assert resumed.steps[0] == (1, 2)
