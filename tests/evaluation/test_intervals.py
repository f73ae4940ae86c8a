"""Confidence intervals against textbook values, and against the truth of simulated texts."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.evaluation.intervals import estimate, estimate_quantile


def test_students_interval() -> None:
    # Student's own sleep data (1908): mean 1.58, standard error 0.3890, 95 % interval 0.70 to 2.46
    found = estimate([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert found["value"] == pytest.approx(1.58)
    assert found["low"] == pytest.approx(0.7001142, abs=1e-4)
    assert found["high"] == pytest.approx(2.4598858, abs=1e-4)


def test_many_windows() -> None:
    found = estimate([0.0, 1.0] * 50)  # standard error 0.050252, t(99) = 1.9842
    assert found["high"] == pytest.approx(0.5 + 1.9842 * 0.0502519, abs=1e-4)


def test_one_window_has_no_interval() -> None:
    assert estimate([2.0]) == {"value": 2.0, "low": None, "high": None}


def test_transform() -> None:
    plain, transformed = estimate([1.0, 2.0, 3.0]), estimate([1.0, 2.0, 3.0], math.exp)
    for key in ("value", "low", "high"):
        assert transformed[key] == math.exp(plain[key])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("q", "normal"), [(0.5, 0.0), (0.99, 2.3263)])
def test_a_quantiles_interval_holds_the_true_one(q: float, normal: float) -> None:
    """Log-normal tokens, a sixth of whose variance is their window's: the true quantile is known."""
    generator = torch.Generator().manual_seed(0)
    truth, rounds, hits = math.exp(normal), 60, 0
    for _ in range(rounds):
        windows, tokens = (torch.randn(shape, generator=generator) for shape in ((24, 1), (24, 100)))
        found = estimate_quantile(((windows + math.sqrt(5) * tokens) / math.sqrt(6)).exp(), q)
        assert found["low"] is not None
        assert found["high"] is not None
        hits += found["low"] <= truth <= found["high"]
    assert 0.85 * rounds <= hits


def test_a_quantile_of_nothing_and_of_one_window() -> None:
    assert estimate_quantile(torch.zeros(3, 4), 0.5) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert estimate_quantile(torch.tensor([[1.0, 2.0, 3.0]]), 0.5) == {"value": 2.0, "low": None, "high": None}
