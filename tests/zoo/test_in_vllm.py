"""vLLM on a CPU reads the int8 tensors of tiny models, and generates with them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DENSE = ("llama", "qwen3")  # experts want AMX, AVX-512 or zentorch


@pytest.mark.vllm
def test_vllm_reads_int8_and_generates() -> None:
    command = [sys.executable, "-m", "tests.zoo.in_vllm", "--only", f"^text:({'|'.join(DENSE)})$"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    outcomes = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert outcomes.keys() == {f"text:{name}" for name in DENSE}, done.stderr[-2000:]
    for outcome in outcomes.values():
        found = re.fullmatch(r"(\d+) int8 tensors, generates \[4, 4\]", outcome)
        assert found, outcome
        assert int(found[1]) == 8  # q, k, v together, o, gate and up together, down, of two layers
