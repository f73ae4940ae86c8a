"""Streaming statistics and the observers on them, against numpy on the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant.importance import Importance
from qtool.quant.observers import static_range
from qtool.quant.statistics import InputStatistics
from qtool.recipe.policy import LeastError, MinMax, Percentile
from qtool.scheme import QuantizationArgs

ARGS = QuantizationArgs(strategy="tensor", symmetric=False)


def batches(samples: int = 7, length: int = 12, width: int = 5) -> list[torch.Tensor]:
    """Calibration samples as they arrive: batches of three, the last one smaller."""
    x = torch.randn(samples, length, width, generator=torch.Generator().manual_seed(3))
    x[..., 2] *= 30
    return list(x.split(3))


def observed(parts: list[torch.Tensor], *, stride: int = 4, with_hessian: bool = False) -> InputStatistics:
    statistics = InputStatistics(stride=stride, with_hessian=with_hessian)
    for part in parts:
        statistics.update(part)
    return statistics


def test_extremes_and_count() -> None:
    parts = batches()
    whole = torch.cat(parts).reshape(-1, 5).numpy()
    statistics = observed(parts)
    assert statistics.tokens == len(whole)
    np.testing.assert_array_equal(statistics.low.numpy(), whole.min(0))
    np.testing.assert_array_equal(statistics.high.numpy(), whole.max(0))
    np.testing.assert_array_equal(statistics.amax.numpy(), np.abs(whole).max(0))


def test_energy() -> None:
    parts = batches()
    whole = torch.cat(parts).reshape(-1, 5).double().numpy()
    np.testing.assert_allclose(observed(parts).energy.numpy(), (whole**2).mean(0), rtol=1e-5)


def test_gram_of_every_other_token() -> None:
    parts = batches(samples=6)  # the same number of tokens in each batch
    used = []
    seen = 0
    for part in parts:
        used.append(part.reshape(-1, 5)[seen % 2 :: 2].double().numpy())
        seen += len(part)
    tokens = np.concatenate(used)
    statistics = observed(parts, with_hessian=True)
    np.testing.assert_allclose(statistics.hessian.numpy(), tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(statistics.energy.numpy(), (tokens**2).mean(0), rtol=1e-5)


@pytest.mark.parametrize("with_hessian", [True, False])
def test_tokens_that_matter_more_weigh_more(with_hessian: bool) -> None:
    parts = batches(samples=6)
    weights = torch.linspace(0, 2, 6 * 12)
    importance = Importance(weights, torch.ones(3))
    statistics = InputStatistics(stride=4, with_hessian=with_hessian, importance=importance)
    for part in parts:
        statistics.update(part)
    every = [*range(0, 36, 2), *range(36 + 1, 72, 2)] if with_hessian else [*range(72)]
    tokens, w = torch.cat(parts).reshape(-1, 5).double().numpy()[every], weights.double().numpy()[every]
    energy = (w[:, None] * tokens**2).sum(0) / w.sum()
    np.testing.assert_allclose(statistics.energy.numpy(), energy, rtol=1e-4)
    if with_hessian:
        hessian = (w[:, None] * tokens).T @ tokens / w.sum()
        np.testing.assert_allclose(statistics.hessian.numpy(), hessian, rtol=1e-4, atol=1e-4)
        assert statistics.hessian_tokens == round(w.sum() ** 2 / (w**2).sum())
    kept = statistics.importance
    assert kept is not None
    places = [int((torch.cat(parts).reshape(-1, 5) == row).all(dim=1).nonzero()[0, 0]) for row in statistics.sample]
    assert kept.tokens.tolist() == weights[places].tolist()


def test_gram_of_bfloat16_is_summed_in_float32() -> None:
    part = torch.ones(1, 64, 4, dtype=torch.bfloat16)
    statistics = observed([part] * 100, with_hessian=True)
    assert statistics.hessian.dtype == torch.float32
    assert torch.equal(statistics.hessian, torch.ones(4, 4))


def test_sample_takes_every_position_alike() -> None:
    length, stride = 12, 4
    positions = torch.arange(length, dtype=torch.float32)[None, :, None].expand(8, length, 2)
    kept = observed(list(positions.split(3)), stride=stride).sample[:, 0]
    assert len(kept) == 8 * length // stride
    # with 8 samples and a stride of 4 each position is kept exactly twice
    assert sorted(kept.tolist()) == sorted(2 * [float(p) for p in range(length)])


def test_batching_does_not_matter() -> None:
    whole = torch.cat(batches())
    one, many = observed([whole]), observed(list(whole.split(1)))
    assert torch.equal(one.sample, many.sample)
    assert torch.equal(one.low, many.low)
    torch.testing.assert_close(one.energy, many.energy)


def test_nothing_observed() -> None:
    with pytest.raises(ValueError, match="no batch"):
        _ = InputStatistics(stride=1, with_hessian=False).low
    with pytest.raises(ValueError, match="Hessian"):
        _ = observed(batches()).hessian


def test_minmax_range() -> None:
    statistics = observed(batches())
    low, high = static_range(statistics.smoothed(None), MinMax(method="minmax"), ARGS)
    whole = torch.cat(batches()).numpy()
    assert (low, high) == (whole.min(), whole.max())


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_percentile_range(percentile: float) -> None:
    sample = torch.randn(400, 25, generator=torch.Generator().manual_seed(0))
    observer = Percentile(method="percentile", percentile=percentile)
    low, high = static_range(observed([sample[None]], stride=1).smoothed(None), observer, ARGS)
    flat = sample.numpy().ravel()
    assert high == pytest.approx(np.percentile(flat, percentile), abs=0.05)
    assert low == pytest.approx(np.percentile(flat, 100 - percentile), abs=0.05)
    assert ((flat > high).mean(), (flat < low).mean()) == pytest.approx((1 - percentile / 100,) * 2, abs=1e-3)


def mean_squared_error(flat: np.ndarray, low: float, high: float) -> float:
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    offset = np.round(-128 - min(low, 0.0) / scale)
    q = np.clip(np.round(flat / scale + offset), -128, 127)
    return float((((q - offset) * scale - flat) ** 2).mean())


def test_mse_range() -> None:
    sample = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    sample[7, 3] = 60.0  # one outlier that is not worth a coarse step for all the rest
    low, high = static_range(observed([sample[None]], stride=1).smoothed(None), LeastError(method="mse"), ARGS)
    flat = sample.double().numpy().ravel()
    candidates = [1 - i / 60 for i in range(60)]
    best = min(mean_squared_error(flat, float(sample.min()) * f, float(sample.max()) * f) for f in candidates)
    assert mean_squared_error(flat, low, high) == pytest.approx(best, rel=1e-3)
    assert best < mean_squared_error(flat, float(sample.min()), float(sample.max()))


@pytest.mark.parametrize("scaled", [False, True])
def test_smoothed_statistics_are_those_of_the_smoothed_input(scaled: bool) -> None:
    s = torch.logspace(-1, 1, batches()[0].shape[-1]) if scaled else None
    found = observed(batches(), with_hessian=True).smoothed(s)
    truth = observed([part / (1 if s is None else s) for part in batches()], with_hessian=True)
    torch.testing.assert_close(found.sample, truth.sample)
    torch.testing.assert_close(found.low, truth.low)
    torch.testing.assert_close(found.high, truth.high)
    torch.testing.assert_close(found.energy, truth.energy)
    torch.testing.assert_close(found.hessian, truth.hessian)
