"""The search for clipping ratios, against numpy."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from qtool.quant.integer import symmetric_scale
from qtool.quant.rounding.clipping import ScaleSearch
from qtool.quant.rounding.errors import ErrorByEnergy, ErrorOnTokens, RowError
from qtool.quant.rounding.nearest import round_to_nearest
from qtool.scheme import QuantizationArgs

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
CHANNEL = QuantizationArgs()


def random_weight(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def long_tailed(rows: int, width: int) -> torch.Tensor:
    """Where clipping pays."""
    return random_weight(rows, width) ** 3


def as_it_is(scale: torch.Tensor) -> torch.Tensor:
    return scale


def error_of(w: np.ndarray, bound: float, num_bits: int, x: np.ndarray, kind: str) -> float:
    """What is lost of the output when values [n] that share a scale are clipped there.

    Integers are found in float32: a bound is half a step from the next, and which way it rounds is for that to decide.
    """
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    step = np.float32(2 * bound / (high - low))
    q = np.clip(np.round(np.clip(w.astype(np.float32), -np.float32(bound), np.float32(bound)) / step), low, high)
    delta = q.astype(np.float64) * float(step) - w
    return float(((x @ delta) ** 2).sum() if kind == "tokens" else (x**2 * delta**2).sum())


@pytest.mark.parametrize("kind", ["tokens", "energy"])
def test_search_clip_takes_the_best_ratio_of_every_row(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 40, generator=generator) ** 3  # long tails: clipping pays
    x = torch.randn(50, 40, generator=generator)
    x[:, 20:] *= 0.02
    weight[::2, 30] = 30.0  # an outlier that little input meets
    if kind == "tokens":
        row_error: RowError = ErrorOnTokens(x)
    else:
        row_error = ErrorByEnergy(x.square().mean(dim=0))
    scales, bounds, _ = ScaleSearch(CHANNEL, RATIOS, row_error, as_it_is).of_rows(weight)
    chosen = set()
    for row, w in enumerate(weight.double().numpy()):
        errors = []
        for ratio in RATIOS:
            bound = np.abs(w).max() * ratio
            step = 2 * bound / 255
            delta = np.clip(np.round(np.clip(w, -bound, bound) / step), -128, 127) * step - w
            squared = (x.double().numpy() @ delta) ** 2 if kind == "tokens" else x.double().numpy() ** 2 * delta**2
            errors.append(squared.sum())
        found = int(np.abs(np.array(RATIOS) * np.abs(w).max() - float(bounds[row])).argmin())
        assert errors[found] <= min(errors) * 1.001
        assert float(scales[row]) == pytest.approx(2 * float(bounds[row]) / 255, rel=1e-6)
        chosen.add(found)
    assert len(chosen) > 1


def test_search_clip_keeps_to_storable_scales() -> None:
    weight = random_weight(6, 32)

    def stored(scale: torch.Tensor) -> torch.Tensor:
        return scale.to(torch.bfloat16).float()

    scales, *_ = ScaleSearch(CHANNEL, RATIOS, ErrorByEnergy(torch.ones(32)), stored).of_rows(weight)
    assert torch.equal(scales, stored(scales))
    scales, bounds, _ = ScaleSearch(CHANNEL, (1.0,), ErrorByEnergy(torch.ones(32)), stored).of_rows(weight)
    assert torch.equal(bounds, weight.abs().amax(dim=1))
    assert torch.equal(scales, stored(symmetric_scale(bounds, CHANNEL)))


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 16)
    weight[1] = 1.0
    scales, bounds, _ = ScaleSearch(CHANNEL, RATIOS, ErrorByEnergy(torch.ones(16)), as_it_is).of_rows(weight)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert not round_to_nearest(weight, scales, bounds, CHANNEL)[0].any()


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["tokens", "energy"])
def test_every_group_has_its_best_ratio(num_bits: int, kind: str) -> None:
    args = QuantizationArgs(num_bits=num_bits, strategy="group", group_size=8)
    weight, x = long_tailed(6, 24), torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    row_error: RowError = ErrorOnTokens(x) if kind == "tokens" else ErrorByEnergy(x.square().mean(dim=0))
    scales, bounds, _ = ScaleSearch(args, RATIOS, row_error, as_it_is).of_rows(weight)
    assert scales.shape == bounds.shape == (6, 3)
    torch.testing.assert_close(scales, symmetric_scale(bounds, args))
    for row in range(6):
        for group in range(3):
            columns = slice(8 * group, 8 * group + 8)
            w, seen = weight[row, columns].double().numpy(), x[:, columns].double().numpy()
            peak = np.float32(np.abs(w).max())
            errors = [error_of(w, float(peak * np.float32(ratio)), num_bits, seen, kind) for ratio in RATIOS]
            chosen = error_of(w, float(bounds[row, group]), num_bits, seen, kind)
            assert chosen <= min(errors) * 1.001


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 8])
def test_signed_scales_are_the_best_of_both_signs(num_bits: int, group_size: int | None) -> None:
    """And of one ratio more, at which the largest weight is the least integer."""
    strategy: Literal["group", "channel"] = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=num_bits, strategy=strategy, group_size=group_size)
    weight, x = long_tailed(6, 24), torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    energy = x.square().mean(dim=0)
    found = ScaleSearch(args, RATIOS, ErrorByEnergy(energy), as_it_is, signed=True).of_rows(weight)
    scales, bounds = (each.view(6, -1) for each in (found.scale, found.bound))
    width = group_size or 24
    ratios = (*RATIOS, (2**num_bits - 1) / 2**num_bits)
    for row in range(6):
        for group in range(24 // width):
            columns = slice(width * group, width * (group + 1))
            w, seen = weight[row, columns].double().numpy(), energy[columns].double().numpy() ** 0.5
            peak = np.float32(np.abs(w).max())

            def error(sign: float, bound: float, w: np.ndarray = w, seen: np.ndarray = seen) -> float:
                return error_of(sign * w, bound, num_bits, seen[None], "energy")

            best = min(error(sign, float(peak * np.float32(ratio))) for ratio in ratios for sign in (1, -1))
            sign = float(scales[row, group].sign())
            assert error(sign, float(bounds[row, group])) <= best * 1.001
    assert {-1, 1} == set(scales.sign().flatten().tolist())
    torch.testing.assert_close(scales.abs(), symmetric_scale(bounds, args))


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 8])
def test_ranges_with_zero_points_are_the_best(num_bits: int, group_size: int | None) -> None:
    strategy: Literal["group", "channel"] = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=num_bits, strategy=strategy, group_size=group_size, symmetric=False)
    weight = long_tailed(6, 24) + 0.5
    energy = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.1
    found = ScaleSearch(args, RATIOS, ErrorByEnergy(energy), as_it_is).of_rows(weight)
    assert found.zero_point is not None
    assert found.zero_point.shape == found.scale.shape == args.scales_shape((6, 24))
    scales, zeros = (each.view(6, -1).double().numpy() for each in (found.scale, found.zero_point))
    width = group_size or 24
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    for row in range(6):
        for group in range(24 // width):
            columns = slice(width * group, width * (group + 1))
            w, weighs = weight[row, columns].numpy(), energy[columns].double().numpy()

            def error(scale: float, zero: float, w: np.ndarray = w, weighs: np.ndarray = weighs) -> float:
                q = np.clip(np.round(w / np.float32(scale)) + zero, low, high)
                return float((weighs * ((q - zero) * scale - w) ** 2).sum())

            tried = []
            for ratio in RATIOS:
                least, most = min(w.min(), 0) * ratio, max(w.max(), 0) * ratio
                step = (most - least) / (2**num_bits - 1)
                tried.append(error(step, float(np.clip(np.round(low - least / step), low, high))))
            zero = zeros[row, group]
            assert zero == round(zero)
            assert low <= zero <= high
            assert error(scales[row, group], zero) <= min(tried) * 1.001 + 1e-12


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_whole_tensor_has_its_best_ratio(num_bits: int) -> None:
    args = QuantizationArgs(num_bits=num_bits, strategy="tensor")
    weight, x = long_tailed(7, 24), torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    search = ScaleSearch(args, RATIOS, ErrorByEnergy(x.square().mean(dim=0)), as_it_is)
    scales, bounds, _ = search.of_tensor(lambda: weight.split(2))
    assert scales.shape == bounds.shape == (1,)
    peak = float(weight.abs().max())

    def error(bound: float) -> float:
        rows = weight.double().numpy()
        return sum(error_of(row, bound, num_bits, x.double().numpy(), "energy") for row in rows)

    assert error(float(bounds)) <= min(error(peak * ratio) for ratio in RATIOS) * 1.001
    assert float(scales) == pytest.approx(2 * float(bounds) / (2**num_bits - 1))
    unclipped, bound, _ = ScaleSearch(args, (1.0,), None, as_it_is).of_tensor(lambda: weight.split(3))
    assert (float(bound), float(unclipped)) == (peak, pytest.approx(2 * peak / (2**num_bits - 1)))
