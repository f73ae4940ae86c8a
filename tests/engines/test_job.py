"""Jobs and what comes of them, on their way through the pipe between two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtool.engines.job import CalibrationText, CalibrationTokens, OutputFolder, QuantizationJob, Resources
from qtool.engines.native.execute import execute
from qtool.engines.native.prepare import prepare
from qtool.engines.report import (
    CalibrationUsed,
    DryRun,
    EstimatedResources,
    LaunchOfCards,
    LayersSummary,
    QuantizationReport,
    QuantizationResult,
    QuantizedGroup,
)
from qtool.recipe.load import load
from tests.engines.conftest import Quiet


def test_a_job_arrives_as_it_was_sent() -> None:
    plain = QuantizationJob(
        model=Path("/models/a"),
        output=OutputFolder(Path("/models/b"), "modelslim"),
        recipe=load("default"),
        scheme="w8a8",
        calibration=CalibrationText("builtin", 8, 64),
    )
    full = QuantizationJob(
        model=Path("/models/a"),
        output=OutputFolder(Path("/models/b"), "golden-stick", overwrite=True, resume=True, restart=True),
        recipe=load("deepseek-r1-osl"),
        scheme="w8a8",
        calibration=CalibrationText("self", 2, 3, 7, CalibrationTokens([[1, 2, 3], [4, 5, 6]], "ab", "self")),
        device="npu",
        devices=8,
        trust_remote_code=True,
        resources=Resources(memory=10**9, workers=2, ray=None, threads=3),
    )
    for job in (plain, full):
        assert QuantizationJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_a_result_arrives_as_it_was_sent(tiny_llama: Path, tmp_path: Path) -> None:
    quiet: Any = Quiet()
    job = QuantizationJob(
        model=tiny_llama,
        output=OutputFolder(tmp_path / "out", "compressed-tensors"),
        recipe=load("default"),
        scheme="w8a8",
        calibration=CalibrationText("builtin", 4, 32),
        device="cpu",
    )
    result = execute(prepare(job, quiet), quiet)
    assert QuantizationResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert result.output == tmp_path / "out"
    assert {group.layer for group in result.report.layers} == {"model.layers.0", "model.layers.1"}
    recorded = json.loads((tmp_path / "out" / "qtool.json").read_text())
    assert recorded == result.report.to_json()
    # These differ from run to run, and the file must not.
    more = {"seconds", "peak_memory_bytes", "output", "output_bytes", "input_bytes"}
    assert result.printed().keys() - recorded.keys() == more


def test_a_report_without_measured_errors_has_no_mean_of_them() -> None:
    report = QuantizationReport(
        versions={"mindspore": "2.7.1"},
        engine="golden-stick",
        device="cpu",
        source="a",
        origin=None,
        format="golden-stick",
        recipe={},
        scheme="w8a8",
        calibration=CalibrationUsed("builtin", "ab", 2, 3),
        seconds=1.5,
        peak_memory_bytes=7,
        layers=[QuantizedGroup("model.layers.0", ["mlp.up_proj"], "static", "osl", None)],
    )
    sent = report.to_json()
    assert QuantizationReport.from_json(json.loads(json.dumps(sent))) == report
    assert not {"mean_relative_error", "threads", "experts"} & sent.keys()
    group = {"layer": "model.layers.0", "linears": ["mlp.up_proj"], "activations": "static", "smoothing": "osl"}
    assert sent["layers"] == [{**group, "alpha": None}]


def test_a_dry_run_arrives_as_it_was_sent() -> None:
    common: dict[str, Any] = {
        "layers": [LayersSummary("model.layers.*.mlp.up_proj", 2, "float")],
        "calibration": {"data": "builtin", "samples": 2, "seq_len": 3},
        "input_bytes": 10,
        "output_bytes": 5,
    }
    native = DryRun(**common, resources=EstimatedResources(1.5, 2, 3, 4))
    cards = DryRun(**common, launch=LaunchOfCards("a: 1\n", "msrun rank.py"))
    for plan in (native, cards):
        assert DryRun.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert native.printed()["scratch_bytes"] == 3
    assert cards.printed()["msrun"] == "msrun rank.py"
