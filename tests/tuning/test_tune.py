"""Coming nearer to a goal, with measurements that are told here: which recipe is the one in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qtool.engines.job import CalibrationText
from qtool.errors import InputError
from qtool.evaluation.intervals import Estimate
from qtool.evaluation.job import EvaluationText
from qtool.recipe.load import load
from qtool.tuning import tune as tuning
from qtool.tuning.job import LinearBytes, Measured, Sensitivities, Sensitivity
from qtool.tuning.tune import Goal, Quality, TuningJob, tune

LINEARS = [f"model.layers.{i}.mlp.down_proj" for i in range(8)]


def tuned(monkeypatch: pytest.MonkeyPatch, goal: float, measured: list[float], budget: int = 4) -> dict[str, Any]:
    """tune() where the untuned scheme and then recipe after recipe have these KL divergences; 0.008 was estimated."""
    groups = [
        Sensitivity([name], way, way, None, 0.1, kl, 100)
        for name in LINEARS
        for way, kl in (("static", 2e-3), ("dynamic", 1e-3))
    ]
    found = Sensitivities(
        measured=Measured(groups, groups),
        bytes=dict.fromkeys(LINEARS, LinearBytes(200, 100)),
        total_bytes=1000,
        input_bytes=2000,
        text={},
        calibration={},
        seconds=1,
        peak_memory_bytes=1,
    )
    monkeypatch.setattr(tuning, "sensitivities", lambda *_: found)
    left = iter(measured)
    monkeypatch.setattr(tuning, "_evaluated", lambda *_: Quality(_exactly(next(left)), _exactly(1), _exactly(1)))
    job = TuningJob(
        model=Path("model"),
        recipe=load("default"),
        scheme="w8a8",
        extends="default",
        format="compressed-tensors",
        goal=Goal(max_kl=goal),
        text=EvaluationText("builtin", 1, 2),
        calibration=CalibrationText("builtin", 1, 2),
        budget=budget,
    )
    result = tune(job, lambda event: None)
    assert next(left, None) is None
    return result.to_json()


def _exactly(value: float) -> Estimate:
    return {"value": value, "low": None, "high": None}


def test_the_best_one_measured_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, 0.005, [0.008, 0.0054, 0.0052, 0.0056])
    assert (result["reached"], result["evaluations"]) == (False, 4)
    assert result["tuned"]["kl_divergence"]["value"] == 0.0052
    floats = sum(row["to"] == "float" for row in result["changed"])
    assert result["tuned"]["bytes"] == 1000 + 100 * floats  # of this one, not of the last


def test_the_first_that_is_good_enough_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, 0.005, [0.008, 0.0055, 0.0049])
    assert (result["reached"], result["tuned"]["kl_divergence"]["value"]) == (True, 0.0049)


def test_what_was_measured_is_kept_when_only_floats_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, 0.001, [0.008, 0.05])
    assert (result["reached"], result["tuned"]["kl_divergence"]["value"]) == (False, 0.05)


def test_no_recipe_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="every linear would have to stay float"):
        tuned(monkeypatch, 1e-9, [0.008])
