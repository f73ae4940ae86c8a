"""qtool tune, run as a user would: its recipes are quantized by and evaluated as anybody's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import schemes
from tests import families
from tests.engines.test_schemes import ours, theirs

CALIBRATION = ("--samples", "4", "--seq-len", "64")
TEXT = ("--windows", "8", "--length", "64")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def divergence(run_qtool: Callable[..., Any], model: Path, quantized: Path) -> float:
    done = run_qtool("eval", model, quantized, *TEXT, "--json")
    assert done.code == 0, done.stderr
    return float(json.loads(done.stdout)["kl_divergence"]["value"])


def test_a_larger_model_that_is_better(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    done = run_qtool("tune", tiny_llama, "--max-size", "110%", "--budget", "2", *TEXT, *CALIBRATION, "--output", recipe)
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == str(recipe)
    assert "2 evaluations" in done.stderr
    assert run_qtool("recipes", "validate", recipe).code == 0
    for name, options in (("untuned", ("--scheme", "w8a8")), ("tuned", ("--recipe", recipe))):
        made = run_qtool("quantize", tiny_llama, "--output", tmp_path / name, *options, *CALIBRATION)
        assert made.code == 0, made.stderr
    untuned, tuned = (divergence(run_qtool, tiny_llama, tmp_path / name) for name in ("untuned", "tuned"))
    assert f"{untuned:.5f}" in done.stderr  # the table's figures are those that anybody gets
    assert f"{tuned:.5f}" in done.stderr
    assert tuned < untuned
    assert size(tmp_path / "untuned") < size(tmp_path / "tuned") < 1.11 * size(tmp_path / "untuned")


def test_a_mixture_of_precisions(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """Smaller than the scheme, with all precisions that vLLM reads; transformers computes what `eval` does with it."""
    recipe, report, output = tmp_path / "mine.yaml", tmp_path / "page.html", tmp_path / "output"
    options = ("--runtime", "vllm", "--max-size", "85%", "--budget", "2", "--output", recipe, "--report", report)
    done = run_qtool("tune", tiny_llama, *options, *TEXT, *CALIBRATION)
    assert done.code == 0, done.stderr
    assert "What more bytes would give" in done.stderr
    page = report.read_text()
    assert page.count("<svg") == 1
    assert all(f'id="{table}"' in page for table in ("frontier", "ways"))
    made = run_qtool("quantize", tiny_llama, "--output", output, "--recipe", recipe, *CALIBRATION)
    assert made.code == 0, made.stderr
    found = {scheme for scheme in schemes(Checkpoint.open(output)).values() if scheme is not None}
    assert {scheme.weights.num_bits for scheme in found} == {4, 8}
    untuned = tmp_path / "untuned"
    assert run_qtool("quantize", tiny_llama, "--output", untuned, *CALIBRATION).code == 0
    assert size(output) < 0.9 * size(untuned)
    ids = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    found_logits, expected, plain = ours(output, ids), theirs(output, ids), theirs(tiny_llama, ids)
    error = found_logits - expected  # zero but where an activation lies between two integers, and after it
    assert float(error.norm() / (expected - plain).norm()) < 0.2
    assert float(error[0].abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.vllm
def test_vllm_computes_with_a_mixture(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    kinds = {"self_attn.[qkv]_proj": "W8A8", "self_attn.o_proj": "W4A16-g32", "mlp.*": "W8A8-dynamic"}
    policies = [f"{{layers: '.*\\.{name}', scheme: {scheme}}}" for name, scheme in kinds.items()]
    recipe, output = tmp_path / "mine.yaml", tmp_path / "output"
    recipe.write_text(f"{{name: x, description: x, default_scheme: s, schemes: {{s: [{', '.join(policies)}]}}}}")
    assert run_qtool("quantize", tiny_llama, "--output", output, "--recipe", recipe, *CALIBRATION).code == 0
    here = divergence(run_qtool, tiny_llama, output)
    done = run_qtool("eval", tiny_llama, output, *TEXT, "--runtime", "vllm", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["kl_divergence"]["value"] == pytest.approx(here, rel=0.5, abs=5e-5)


def test_as_good_as_asked_for(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("tune", tiny_llama, *TEXT, *CALIBRATION, "--json", "--max-kl", "0.0004", "--budget", "4")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    reference, tuned = result["reference"], result["tuned"]
    assert tuned["kl_divergence"]["value"] <= 0.0004 < reference["kl_divergence"]["value"]
    assert tuned["bytes"] > reference["bytes"]
    assert any(row["to"] == "float" for row in result["changed"])
    assert result["reached"] is True
    assert 2 <= result["evaluations"] <= 4


def test_a_mixture_of_experts(tiny_tokenizer: Any, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """With room for one layer's experts as floats they become it, all together, or none do."""
    model = families.make(tmp_path / "model", "mixtral", tiny_tokenizer)
    recipe, output = tmp_path / "mine.yaml", tmp_path / "output"
    done = run_qtool("tune", model, "--max-size", "150%", "--budget", "2", *TEXT, *CALIBRATION, "--output", recipe)
    assert done.code == 0, done.stderr
    done = run_qtool("quantize", model, "--output", output, "--recipe", recipe, *CALIBRATION)
    assert done.code == 0, done.stderr
    tensors = families.load(output)
    for layer in range(2):
        experts = [
            name for name in tensors if f".{layer}.block_sparse_moe.experts." in name and name.endswith(".weight")
        ]
        assert len({tensors[name].dtype for name in experts}) == 1
    assert any(tensors[name].dtype == torch.bfloat16 for name in tensors if ".experts." in name)
    assert any(tensors[name].dtype == torch.int8 for name in tensors if ".experts." in name)


def test_a_goal_out_of_reach(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("tune", tiny_llama, *TEXT, *CALIBRATION, "--max-kl", "1e-12")
    assert done.code == 2
    assert "every linear would have to stay float" in done.stderr
    assert "--max-kl" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--max-kl X, or --max-size SIZE"),
        (("--max-kl", "1", "--max-size", "1GB"), "--max-kl X, or --max-size SIZE"),
        (("--max-size", "small"), "is not a size"),
        (("--max-size", "100", *TEXT, *CALIBRATION), "at least"),
        (("--max-kl", "1", "--budget", "1"), "--budget"),
        (("--max-kl", "1", "--calibration", "self"), "--calibration"),
        (("--max-kl", "1", "--scheme", "w4a4"), "no scheme 'w4a4'"),
        (("--max-kl", "1", "--output", "{there}"), "exists already"),
        (("--max-kl", "1", "--output", "{there}/x.yaml"), "no such folder"),
        (("--max-kl", "1", "--output", "{there.parent}", "--overwrite"), "is a folder"),
        (("--max-kl", "1", "--scratch", "{there}"), "--scratch"),
        (("--max-kl", "1", "--recipe", "{child}", "--output", "{base}", "--overwrite"), "builds on this one"),
        (("--max-kl", "1", "--recipe", "{child}", "--output", "{child}", "--overwrite"), "builds on this one"),
    ],
)
def test_bad_input(
    tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    files = {name: tmp_path / f"{name}.yaml" for name in ("there", "base", "child")}
    files["there"].write_text("mine")
    for name, extended in (("base", "default"), ("child", "./base.yaml")):
        files[name].write_text(f"{{extends: {extended}, name: {name}, description: mine}}")
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    done = run_qtool("tune", tiny_llama, *(each.format(**files) for each in arguments))
    assert done.code == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before
