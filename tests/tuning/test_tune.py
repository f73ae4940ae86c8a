"""Coming nearer to a goal, with measurements that are told here: which recipe is the one in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError
from qtool.recipe.load import load
from qtool.tuning import tune as tuning
from qtool.tuning.tune import Goal, Job, tune

LINEARS = [f"model.layers.{i}.mlp.down_proj" for i in range(8)]


def tuned(monkeypatch: pytest.MonkeyPatch, goal: float, measured: list[float], budget: int = 4) -> dict[str, Any]:
    """tune() where the untuned scheme and then recipe after recipe have these KL divergences; 0.008 was estimated."""
    groups = [
        {"linears": [name], "way": way, "kl": kl}
        for name in LINEARS
        for way, kl in (("static", 2e-3), ("dynamic", 1e-3))
    ]
    found = {"groups": groups, "bytes": {name: [200, 100] for name in LINEARS}, "total_bytes": 1000}
    monkeypatch.setattr(tuning, "sensitivities", lambda job, modes: found)
    left = iter(measured)
    monkeypatch.setattr(tuning, "_evaluated", lambda *_: {"kl_divergence": {"value": next(left)}})
    size = {"data": "builtin", "samples": 1, "seq_len": 2, "seed": 0}
    job = Job(
        Path("model"), load("default"), "w8a8", "default", "compressed-tensors", Goal(max_kl=goal), "builtin", size,
        budget=budget,
    )  # fmt: skip
    result = tune(job)
    assert next(left, None) is None
    return result


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
