"""The script for whoever has a card runs, on a CPU with small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "check.py"


@pytest.mark.slow
def test_the_script_for_a_real_card(tmp_path: Path) -> None:
    env = os.environ | {"CHECK_DEVICE": "cpu"}
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {case["scheme"] for case in figures["numbers"]} == {"w8a8", "w8a8-dynamic", "w8a8-dynamic, effort high"}
    for case in figures["numbers"]:  # the same device twice
        assert {share["min"] for share in case["equal"].values()} == {1.0}
        assert case["kl_cpu"] == case["kl_device"]
    (cost,) = figures["costs"]
    assert cost["layer_seconds"] > 0
    assert cost["places"]
