"""Which engine quantizes when nobody says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import engines
from qtool.engines.golden_stick import engine as golden_stick
from qtool.environments import lookup
from qtool.errors import InputError
from qtool.jobs import quantize


def test_here_the_native_engine(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("quantize", tiny_llama, "--dry-run", "--samples", 2, "--seq-len", 16)
    assert "engine native (no Ascend NPU here)" in done.stderr


@pytest.mark.parametrize(
    ("model_type", "scheme", "format", "installed", "engine", "words"),
    [
        ("qwen3", "w8a8", "golden-stick", True, "golden-stick", "has Ascend NPUs"),
        ("qwen3", "w8a8", "golden-stick", False, "native", "but no mindspore-gs"),
        ("qwen3", "w4a16", "compressed-tensors", True, "native", "mindspore-gs quantizes to W8A8, not"),
        ("gpt_neox", "w8a8", "golden-stick", True, "native", "can't quantize model_type 'gpt_neox'"),
        ("qwen3_moe", "w8a8", "compressed-tensors", True, "native", "can't be written as compressed-tensors"),
    ],
)
def test_on_ascend(
    model_type: str,
    scheme: str,
    format: str,
    installed: bool,
    engine: str,
    words: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Golden Stick where it is there and can do the job; else the native engine, which says why."""
    (tmp_path / "davinci_manager").touch()
    monkeypatch.setattr(engines, "_ASCEND", tmp_path / "davinci_manager")
    monkeypatch.setattr(lookup, "locate", lambda _: object() if installed else None)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    decided = quantize.decide(model, quantize.Wanted(recipe="default", scheme=scheme, format=format))
    assert decided.engine == engine
    assert words in decided.why


@pytest.mark.parametrize(
    ("wanted", "mode"),
    [
        ({}, "auto"),
        ({"scheme": "w8a8"}, "static"),
        ({"recipe": "default"}, "static"),
        ({"engine": "golden-stick", "format": "golden-stick"}, "static"),
        ({"scheme": "w8a8-dynamic"}, "dynamic"),
    ],
)
def test_where_nobody_chose_attention_is_static_only_where_it_costs_little(
    wanted: dict[str, Any], mode: str, tiny_llama: Path
) -> None:
    decided = quantize.decide(tiny_llama, quantize.Wanted(**wanted))
    policy = decided.job.recipe.policy(decided.job.scheme, "model.layers.0.self_attn.q_proj")
    assert policy is not None
    assert policy.activations.mode == mode
    assert ("static only where calibration finds that this costs little" in decided.why) == (mode == "auto")


def test_a_recipe_that_knows_the_model_keeps_its_choice(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    decided = quantize.decide(model, quantize.Wanted())
    assert decided.job.recipe.name == "qwen3"
    assert all(policy.activations.mode != "auto" for policy in decided.job.recipe.schemes["w8a8"])


def test_where_a_runtime_needs_one_scheme_for_all_layers_nothing_is_decided(tiny_llama: Path, tmp_path: Path) -> None:
    """vLLM asks for StableLM's layers under other names than the files have: patterns that list layers find none."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    for model_type, mode in (("stablelm", "static"), ("gemma", "auto")):
        (model / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        decided = quantize.decide(model, quantize.Wanted())
        policy = decided.job.recipe.policy("w8a8", "model.layers.0.self_attn.q_proj")
        assert policy is not None
        assert policy.activations.mode == mode


@pytest.mark.parametrize("there", [True, False])
def test_accelerate_beside_golden_stick(there: bool, tmp_path: Path) -> None:
    """What fails after an hour of calibration is refused before."""
    program = tmp_path / "python"
    site = tmp_path / "site"
    (site / "accelerate").mkdir(parents=True)
    if there:
        (site / "accelerate" / "__init__.py").touch()
    else:
        shutil.rmtree(site / "accelerate")
    program.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    program.chmod(0o755)
    if not there:
        golden_stick._refuse_accelerate(str(program))
        return
    with pytest.raises(InputError, match="accelerate is installed beside mindspore-gs"):
        golden_stick._refuse_accelerate(str(program))


def test_a_workers_interpreter_needs_only_its_engine() -> None:
    """Its packages are imported where there is nothing but the standard library; the tests' own site is left out."""
    code = "import qtool.engines.golden_stick.worker, qtool.engines.golden_stick.launch, qtool.runtimes.worker.vllm"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("scheme", "format", "blackwell", "is_said"),
    [
        ("w8a8", "compressed-tensors", True, True),
        ("w4a8", "compressed-tensors", True, True),
        ("fp8-dynamic", "compressed-tensors", True, False),
        ("w4a16", "compressed-tensors", True, False),
        ("w8a8", "modelslim", True, False),
        ("w8a8", "compressed-tensors", False, False),
    ],
)
def test_fp8_is_proposed_on_blackwell(
    scheme: str, format: str, blackwell: bool, is_said: bool, tiny_llama: Path
) -> None:
    decided = quantize.decide(tiny_llama, quantize.Wanted(recipe="default", scheme=scheme, format=format))
    said = quantize.advice(decided.job, blackwell=blackwell)
    assert ("--scheme fp8-dynamic" in said if said else False) == is_said
