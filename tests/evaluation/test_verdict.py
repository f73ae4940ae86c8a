"""The sentences that say what an evaluation's figures mean."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from qtool.evaluation import verdict
from qtool.evaluation.intervals import estimate


def result(
    name: str = "/models/tiny-w8a8",
    *,
    ratio: tuple[float, ...] = (1.0, 0.99, 1.01),
    kl: list[float] | None = None,
    nbytes: int = 500,
    base: str = "/models/tiny",
) -> dict[str, Any]:
    windows = [0.004, 0.005, 0.006] if kl is None else kl
    value, low, high = ratio if len(ratio) == 3 else (ratio[0], None, None)
    share = (
        {"value": 0.95, "low": 0.94, "high": 0.96} if len(windows) > 1 else {"value": 0.95, "low": None, "high": None}
    )
    return {
        "base": base, "quantized": name, "text": {"windows": len(windows)},
        "base_perplexity": {"value": 10.0}, "quantized_perplexity": {"value": 10.0 * value},
        "perplexity_ratio": {"value": value, "low": low, "high": high},
        "kl_divergence": estimate(windows), "kl_max": {"value": max(windows)}, "kl_by_window": windows,
        "top1_agreement": share,
        "sizes": {"base": {"a": 1000}, "quantized": {"a": nbytes - 1, "b": 1}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (
            (1.02, 1.01, 1.03),
            "worse than tiny in perplexity: 10.200 against 10.000, +2.00% (95 % interval +1.00% to +3.00%)",
        ),
        ((0.98, 0.97, 0.99), "better than tiny in perplexity"),
        ((1.001, 0.999, 1.003), "within noise of tiny in perplexity"),
    ],
)
def test_one_model_against_its_original(ratio: tuple[float, float, float], words: str) -> None:
    first, *rest = verdict.of_all([result(ratio=ratio)])
    assert first.startswith("tiny-w8a8 is " + words)
    assert "95.0% of all places (95 % interval 94.0% to 96.0%)" in rest[0]
    assert "0.00500 nats per token" in rest[0]
    assert rest[-1] == "It takes 50% of the original's bytes: 500 bytes of 1.0 kB."


def test_one_window_is_no_ground_for_a_verdict() -> None:
    said = " ".join(verdict.of_all([result(ratio=(1.02,), kl=[0.004])]))
    assert not any(words in said for words in ("worse", "better", "within noise"))
    assert "--windows 2" in said


def test_a_model_that_computes_the_same() -> None:
    assert verdict.of_all([result(kl=[0.0, 0.0])])[0] == "tiny-w8a8 computes the same as tiny."


def test_several_are_measured_by_the_best_of_them() -> None:
    """Paired by window: a gap far smaller than the windows' own spread counts where it is in all of them."""
    windows = [0.001, 0.010, 0.100]
    best = result("/m/a", kl=windows)
    worse = result("/m/b", kl=[value + 0.0005 + i * 1e-5 for i, value in enumerate(windows)], nbytes=250)
    same = result("/m/c", kl=[value * factor for value, factor in zip(windows, (1.3, 0.8, 1.02), strict=True)])
    first, *others = verdict.of_all([worse, same, best])
    assert first == "a is nearest to tiny: a KL divergence of 0.03700 nats per token."
    assert sorted(said.partition(":")[0] for said in others) == ["b is worse than a", "c is within noise of a"]
    assert "b is worse than a: +0.00051 nats per token" in " ".join(others)
    assert "it takes 50% fewer bytes" in " ".join(others)
    assert "both take 500 bytes" in " ".join(others)


def test_sizes_that_differ_by_next_to_nothing() -> None:
    def told(nbytes: int) -> str:
        return verdict.of_several(
            [result("/m/a", nbytes=1_000_000), result("/m/b", kl=[0.1, 0.2, 0.3], nbytes=nbytes)]
        )[1]

    assert told(1_000_100).endswith("both take 1.0 MB.")
    assert told(1_060_000).endswith("it takes 6% more bytes.")


def test_the_interval_of_a_paired_difference_holds_what_it_promises() -> None:
    """On simulated windows 95 of 100 intervals hold the true gap."""
    generator, held, runs, gap = random.Random(0), 0, 400, 0.002
    for _ in range(runs):
        windows = [math.exp(generator.gauss(-5, 0.5)) for _ in range(12)]
        other = [value + gap + generator.gauss(0, 0.001) for value in windows]
        found = verdict.difference(result(kl=other), result(kl=windows))
        assert found["low"] is not None
        assert found["high"] is not None
        held += found["low"] <= gap <= found["high"]
    assert 0.92 < held / runs < 0.98


def test_names_tell_models_apart() -> None:
    assert verdict.names([result("/m/w8a8"), result("/m/dynamic")]) == ["w8a8", "dynamic"]
    assert verdict.names([result("/a/x/model"), result("/a/y/model"), result("/a/z")]) == ["x/model", "y/model", "z"]
    assert verdict.names([result("/out/tiny")]) == ["out/tiny"]
