"""The zoo: a sample of it, and all of it where there is time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.zoo import configs
from tests.zoo.judge import ERROR, HOLLOW, REFUSED, RIGHT, Verdict
from tests.zoo.table import registry

SAMPLE = (
    "llama|qwen2_moe|qwen3_next|mixtral|gpt_oss|granitemoe|nemotron_h|llama4_text|gemma2|gpt_neox|falcon|phi3|"
    "deepseek_v2|cohere2|olmo2|gpt2|xlstm"
)
PICTURED = "step3p7|ernie4_5_vl_moe"
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240.0
LEAST_RIGHT = {"text": 167, "image": 78}


def run(only: str, folder: Path) -> list[Verdict]:
    """In an interpreter of its own: a fork of one that has computed with several threads can't start any."""
    output = folder / "zoo.json"
    command = [sys.executable, "-m", "tests.zoo", "--only", only, "--limit", str(LIMIT), "--json", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Verdict(**each) for each in json.loads(output.read_text())]


def _of(verdicts: Sequence[Verdict], *results: str) -> list[str]:
    return [f"{v.kind}:{v.model_type}: {v.reason}" for v in verdicts if v.result in results]


def test_a_sample_is_right(tmp_path: Path) -> None:
    verdicts = run(rf"^text:({SAMPLE})$|^image:({PICTURED})$", tmp_path)
    assert len(verdicts) == SAMPLE.count("|") + PICTURED.count("|") + 2
    assert not [f"{v.model_type}: {v.result}: {v.reason}" for v in verdicts if v.result != RIGHT]


@pytest.mark.slow
@pytest.mark.skipif("QTOOL_TEST_ZOO" not in os.environ, reason="it takes about half an hour: set QTOOL_TEST_ZOO=1")
@pytest.mark.timeout(3000)
def test_every_type_is_right_or_refused(tmp_path: Path) -> None:
    verdicts = run("", tmp_path)
    assert not _of(verdicts, ERROR)
    assert not _of(verdicts, HOLLOW)
    for kind, least in LEAST_RIGHT.items():
        assert sum(v.result == RIGHT for v in verdicts if v.kind == kind) >= least
    assert {v.model_type for v in verdicts if v.result == REFUSED} <= configs.ARGUED.keys()


def test_vllms_registry_is_read() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    known = registry()
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "Qwen3VLForConditionalGeneration"} <= known
    assert "BambaForCausalLM" not in known  # until 0.23
