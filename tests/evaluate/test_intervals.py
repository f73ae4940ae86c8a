"""Confidence intervals against torch-free textbook values."""

from __future__ import annotations

import math

import pytest

from qtool.evaluate.intervals import estimate


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
