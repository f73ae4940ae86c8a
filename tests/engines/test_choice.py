"""Which engine quantizes when nobody says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import engines


def test_here_the_native_engine(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("quantize", tiny_llama, "--dry-run", "--samples", 2, "--seq-len", 16)
    assert "engine native (no Ascend NPU here)" in done.stderr


def test_golden_stick_on_ascend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_ASCEND", tmp_path / "davinci_manager")
    assert engines.choose()[0] == "native"
    (tmp_path / "davinci_manager").touch()
    assert engines.choose() == ("golden-stick", "this machine has Ascend NPUs")


def test_a_workers_interpreter_needs_only_its_engine() -> None:
    """Its packages are imported where there is nothing but the standard library; the tests' own site is left out."""
    code = "import qtool.engines.golden_stick.worker, qtool.engines.golden_stick.launch, qtool.runtimes.worker.vllm"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
