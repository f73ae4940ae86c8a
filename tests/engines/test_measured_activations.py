"""Activations that calibration decides: what is in the checkpoint, what is told of it, and that it is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
from qtool.engines.native.execute import execute
from qtool.engines.native.prepare import prepare
from qtool.quant.choice import MOST
from qtool.recipe.load import load
from qtool.scheme import W8A8, W8A8_ASYMMETRIC, W8A8_DYNAMIC
from tests.engines.conftest import Quiet

SIZE = ("--samples", "4", "--seq-len", "64")


def schemes(folder: Path) -> dict[str, Any]:
    """Of the decoder's linears, as the checkpoint says."""
    checkpoint = Checkpoint.open(folder)
    form = formats.of(checkpoint)
    return {name: form.scheme(checkpoint, name) for name in form.layers(checkpoint) if ".layers." in name}


@pytest.fixture(scope="module")
def mixed(make_model: Callable[..., Path]) -> Path:
    """OLMo 2 has no norm before its linears: q, k and v have nothing that takes a scale up."""
    return make_model("olmo2", name="measured-olmo2")


@pytest.mark.parametrize(
    ("form", "per_token"),
    [("compressed-tensors", W8A8_ASYMMETRIC), ("golden-stick", W8A8_DYNAMIC), ("modelslim", W8A8_DYNAMIC)],
)
def test_the_checkpoint_has_what_was_decided(
    form: str, per_token: Any, mixed: Path, tmp_path: Path, quantize: Callable[..., dict[str, Any]]
) -> None:
    recipe = load("default").measured("w8a8").model_dump(mode="json")
    report = quantize(mixed, tmp_path / "out", "w8a8", form, schemes=recipe["schemes"])
    found = schemes(tmp_path / "out")
    undecided = [row for row in report["layers"] if "static_cost" in row]
    assert len(undecided) == 4, "q, k and v, and o, of two layers"
    for row in report["layers"]:
        for linear in row["linears"]:
            is_static = row.get("static_cost", math.inf) <= MOST
            assert found[f"{row['layer']}.{linear}"] == (W8A8 if is_static else per_token)
        assert row["activations"] == ("static" if row.get("static_cost", math.inf) <= MOST else "dynamic")
    assert all("static_cost" not in row for row in report["layers"] if "mlp" in row["linears"][0])
    assert "static activations of q_proj, k_proj, v_proj in 0 of 2 layers" in report["activations"]


def test_static_ones_are_those_of_the_static_scheme(
    make_model: Callable[..., Path], tmp_path: Path, quantize: Callable[..., dict[str, Any]], monkeypatch: Any
) -> None:
    """Where all come out static, the checkpoint is that of w8a8, byte for byte; where none do, of per-token ones."""
    model = make_model("llama", name="measured-llama")
    recipe = load("default")
    left_open = recipe.measured("w8a8").model_dump(mode="json")["schemes"]
    dynamic = json.loads(json.dumps(left_open).replace('"mode": "auto"', '"mode": "dynamic"'))
    for name, most, same in (("static", math.inf, recipe.model_dump(mode="json")["schemes"]), ("dynamic", 0, dynamic)):
        monkeypatch.setattr("qtool.quant.choice.MOST", most)
        quantize(model, tmp_path / f"open-{name}", "w8a8", schemes=left_open)
        quantize(model, tmp_path / name, "w8a8", schemes=same)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / f"open-{name}" / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_it_is_said_before_and_afterwards(mixed: Path, tmp_path: Path, run_qtool: Callable[..., Any]) -> None:
    planned = run_qtool("quantize", mixed, "--dry-run", *SIZE)
    assert planned.code == 0, planned.stderr
    assert "static where calibration finds that it costs little" in " ".join(planned.stderr.split())
    done = run_qtool("quantize", mixed, "-o", tmp_path / "out", *SIZE)
    assert done.code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "activations are static only where calibration finds that this costs little" in said
    assert "static activations of q_proj, k_proj, v_proj in 0 of 2 layers" in said
    card = json.loads((tmp_path / "out" / "qtool.json").read_text())
    assert card["activations"] in said


def test_what_was_decided_before_an_interruption_stays(mixed: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Interrupting(Quiet):
        def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
            if (stage, done) == ("quantize", 1):
                raise Interrupted

    def run(output: Path, report: Any, *, resume: bool = False) -> None:
        job = QuantizationJob(
            model=mixed,
            output=OutputFolder(output, "compressed-tensors", resume=resume),
            recipe=load("default").measured("w8a8"),
            scheme="w8a8",
            calibration=CalibrationText("builtin", 4, 64),
            device="cpu",
        )
        execute(prepare(job, report), report)

    run(tmp_path / "whole", Quiet())
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", Interrupting())
    assert not (tmp_path / "parts").exists()
    second = Quiet()
    run(tmp_path / "parts", second, resume=True)
    assert second.steps[0] == (1, 2), "the first layer was done again"
    for file in ("model.safetensors", "config.json", "qtool.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
