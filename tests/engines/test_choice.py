"""Which engine quantizes when nobody says so."""

from __future__ import annotations

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
