"""`qtool quantize` on a good model: what it prints where, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SIZE = ("--samples", "2", "--seq-len", "16")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_llama, folder)
    return folder


def test_prints_the_path_and_nothing_else(model: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("quantize", "-", *SIZE, stdin=f"{model}\n", cwd=model.parent)
    output = model.parent / "tiny-w8a8"
    assert (done.code, done.stdout) == (0, f"{output}\n"), done.stderr
    assert "recipe default" in done.stderr
    assert {path.name for path in model.parent.iterdir()} == {"tiny", "tiny-w8a8"}
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "qtool.json", "tokenizer.json"} <= names


def test_overwrite_with_another_scheme_and_format_as_json(model: Path, run_qtool: Callable[..., Any]) -> None:
    output = model.parent / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "model-00001-of-00009.safetensors").write_text("an old shard")
    command = ("quantize", model, "--output", output, *SIZE, "--overwrite", "--json", "--quiet")
    done = run_qtool(*command, "--scheme", "w8a8-dynamic", "--format", "modelslim", "--calibration", "builtin")
    assert (done.code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["output"] == str(output)
    assert (result["scheme"], result["format"]) == ("w8a8-dynamic", "modelslim")
    assert {row["activations"] for row in result["layers"]} == {"dynamic"}
    assert result["calibration"]["samples"] == 2
    assert not (output / "model-00001-of-00009.safetensors").exists()
    description = json.loads((output / "quant_model_description.json").read_text())
    assert description["model.layers.0.mlp.up_proj.weight"] == "W8A8_DYNAMIC"
    assert {path.name for path in model.parent.iterdir()} == {"tiny", "out"}


def test_dry_run_shows_the_plan_and_writes_nothing(model: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("quantize", model, "--dry-run", "--samples", "3", "--seq-len", "32")
    assert done.code == 0, done.stderr
    assert "model.layers.*.self_attn.q_proj" in done.stderr
    assert "per-tensor static" in done.stderr
    assert "3 x 32 tokens" in done.stdout
    assert "peak memory" in done.stdout
    assert [path.name for path in model.parent.iterdir()] == ["tiny"]


def test_dry_run_as_json_predicts_the_size(model: Path, run_qtool: Callable[..., Any]) -> None:
    plan = json.loads(run_qtool("quantize", model, "--dry-run", "--json").stdout)
    assert [row["count"] for row in plan["layers"]] == [2] * 7
    assert plan["input_bytes"] == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.02)
    assert plan["estimated_seconds"] > 0
    assert plan["estimated_peak_bytes"] > 10**8
    done = run_qtool("quantize", model, *SIZE, "--quiet")
    tensors = load_file(Path(done.stdout.strip()) / "model.safetensors")
    assert plan["output_bytes"] == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.02)


def test_leftovers_of_a_dead_run_are_removed(model: Path, run_qtool: Callable[..., Any]) -> None:
    stale = model.parent / ".out.partial-4194303"
    stale.mkdir()
    (stale / "shard-1").write_bytes(b"half")
    done = run_qtool("quantize", model, "--output", model.parent / "out", *SIZE, "--quiet")
    assert done.code == 0, done.stderr
    assert {path.name for path in model.parent.iterdir()} == {"tiny", "out"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--calibration", "absent.txt"), "no such text file"),
        (("--calibration", "short.txt", "--samples", "8", "--seq-len", "64"), "too little text"),
        (("--output", "there"), "exists already"),
        (("--output", "short.txt/below"), "no output can lie in it"),
    ],
)
def test_a_plan_refuses_what_the_work_would(
    run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "there").mkdir()
    options = options if "--output" in options else (*options, "--output", "new")
    for more in (("--dry-run",), ()):
        done = run_qtool("quantize", tiny_llama, "--engine", "native", *options, *more, cwd=tmp_path)
        assert (done.code, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "new").exists()


def test_a_plan_says_where_the_output_goes(run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    asked = ("quantize", tiny_llama, "--engine", "native", "--output", "new", "--dry-run")
    assert f"output: {tmp_path / 'new'}\n" in run_qtool(*asked, cwd=tmp_path).stdout
    assert json.loads(run_qtool(*asked, "--json", cwd=tmp_path).stdout)["output"] == str(tmp_path / "new")
