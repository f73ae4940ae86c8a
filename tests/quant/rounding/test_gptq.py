"""GPTQ against the plain formula that it abbreviates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qtool.quant.integer import asymmetric_parameters, symmetric_scale
from qtool.quant.rounding.gptq import GPTQ
from qtool.quant.types import dequantize
from qtool.scheme import QuantizationArgs

CHANNEL = QuantizationArgs()


def problem(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, its scales and the Hessian for correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixing * torch.logspace(-1, 1, width)
    return weight, symmetric_scale(weight.abs().amax(dim=1), CHANNEL) * 4, x.t() @ x / tokens


def optimal_brain(
    weight: np.ndarray, scale: np.ndarray, hessian: np.ndarray, args: QuantizationArgs, zero: np.ndarray | int = 0
) -> np.ndarray:
    """Optimal brain quantization in a fixed order: round a column, correct the rest, shrink the explicit inverse."""
    low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    scale = scale.reshape(len(scale), -1)
    steps = scale.repeat(weight.shape[1] // scale.shape[1], axis=1)
    zeros = (np.zeros_like(scale) + np.reshape(zero, (-1, scale.shape[1]) if np.ndim(zero) else ())).repeat(
        weight.shape[1] // scale.shape[1], axis=1
    )
    work = weight.copy()
    quantized = np.zeros_like(work)
    inverse = np.linalg.inv(hessian)
    for column in np.argsort(-np.diag(hessian), kind="stable"):
        moved = np.round(work[:, column] / steps[:, column]) + zeros[:, column]
        quantized[:, column] = np.clip(moved, low, high)
        worth = (quantized[:, column] - zeros[:, column]) * steps[:, column]
        error = (work[:, column] - worth) / inverse[column, column]
        work -= np.outer(error, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return quantized


def quantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounding to nearest, int8."""
    return torch.from_numpy(np.clip(np.round(weight.numpy() / scale.numpy()[:, None]), -128, 127).astype(np.int8))


def error_under(hessian: torch.Tensor, delta: torch.Tensor) -> float:
    return float((delta.double() @ hessian.double() * delta.double()).sum())


@pytest.mark.parametrize(("width", "tokens", "factor"), [(20, None, 1.0), (20, 80, 1.25), (20, 20, 2.0), (20, 4, 2.0)])
def test_correlations_count_less_with_few_tokens(width: int, tokens: int | None, factor: float) -> None:
    weight, scale, hessian = problem(12, width, 100)
    shrunk = hessian.double().numpy() * (1 + (factor - 1) * np.eye(width))
    damped = shrunk + 1e-3 * float(np.diag(shrunk).mean()) * np.eye(width)
    expected = optimal_brain(weight.double().numpy(), scale.double().numpy(), damped, CHANNEL)
    found = GPTQ(hessian.clone(), 0.0, CHANNEL, tokens).round(weight, scale)
    assert (found.numpy() != expected).mean() < 0.01


@pytest.mark.parametrize("width", [5, 64, 150])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_gptq_is_optimal_brain_quantization(width: int, damping: float) -> None:
    weight, scale, hessian = problem(12, width, 4 * width)
    damped = hessian.double().numpy() + max(damping, 1e-3 * float(hessian.diagonal().mean())) * np.eye(width)
    expected = optimal_brain(weight.double().numpy(), scale.double().numpy(), damped, CHANNEL)
    found = GPTQ(hessian.clone(), damping, CHANNEL).round(weight, scale)
    assert found.dtype == torch.int8
    # where float32 meets a tie it may round the other way, and what follows in that row differs with it
    assert (found.numpy() == expected).mean() >= 0.98
    ours = error_under(torch.from_numpy(damped), found * scale[:, None] - weight)
    theirs = error_under(torch.from_numpy(damped), torch.from_numpy(expected).float() * scale[:, None] - weight)
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 32, 16])
def test_any_bits_with_a_scale_per_channel_or_group(num_bits: int, group_size: int | None) -> None:
    weight, _, hessian = problem(12, 96, 400)
    strategy: Any = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=num_bits, strategy=strategy, group_size=group_size)
    peak = weight.abs().amax(dim=1) if group_size is None else weight.unflatten(1, (-1, group_size)).abs().amax(dim=2)
    scale = symmetric_scale(peak, args)
    damped = hessian.double().numpy() + 1e-3 * float(hessian.diagonal().mean()) * np.eye(96)
    expected = optimal_brain(weight.double().numpy(), scale.double().numpy(), damped, args)
    found = GPTQ(hessian.clone(), 0.0, args).round(weight, scale)
    assert (int(found.min()), int(found.max())) == (-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
    ours = error_under(torch.from_numpy(damped), dequantize(found, scale, args) - weight)
    theirs = error_under(torch.from_numpy(damped), dequantize(torch.from_numpy(expected).float(), scale, args) - weight)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert (found.numpy() == expected).mean() >= 0.95


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_zero_points_per_channel_or_group(num_bits: int, group_size: int | None) -> None:
    weight, _, hessian = problem(12, 96, 400)
    weight += 1.5
    strategy: Any = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=num_bits, strategy=strategy, group_size=group_size, symmetric=False)
    parts = weight.unflatten(1, (-1, group_size or 96))
    scale, zero = asymmetric_parameters(parts.amin(dim=2), parts.amax(dim=2), args)
    if group_size is None:
        scale, zero = scale[:, 0], zero[:, 0]
    damped = hessian.double().numpy() + 1e-3 * float(hessian.diagonal().mean()) * np.eye(96)
    expected = optimal_brain(weight.double().numpy(), scale.double().numpy(), damped, args, zero.double().numpy())
    found = GPTQ(hessian.clone(), 0.0, args).round(weight, scale, zero)
    assert (found.numpy() == expected).mean() >= 0.95
    ours, theirs = (
        error_under(torch.from_numpy(damped), dequantize(each, scale, args, zero) - weight)
        for each in (found, torch.from_numpy(expected).float())
    )
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("width", [5, 70])
def test_the_energy_that_later_channels_do_not_explain(width: int) -> None:
    """That of the residual of a regression on them."""
    _, _, hessian = problem(2, width, 4 * width)
    damped = hessian.double().numpy() + 1e-3 * float(hessian.diagonal().mean()) * np.eye(width)
    order = np.argsort(-np.diag(hessian), kind="stable")
    expected = np.zeros(width)
    for place, channel in enumerate(order):
        later = order[place + 1 :]
        slope = np.linalg.solve(damped[np.ix_(later, later)], damped[later, channel])
        expected[channel] = damped[channel, channel] - slope @ damped[later, channel]
    np.testing.assert_allclose(GPTQ(hessian.clone(), 0.0, CHANNEL).energy.numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_errs_less_than_rounding_to_nearest(seed: int) -> None:
    weight, scale, hessian = problem(16, 96, 200, seed)
    nearest = quantize_rows(weight, scale) * scale[:, None] - weight
    compensated = GPTQ(hessian.clone(), 0.0, CHANNEL).round(weight, scale) * scale[:, None] - weight
    assert error_under(hessian, compensated) < 0.8 * error_under(hessian, nearest)


def test_gptq_on_uncorrelated_inputs_rounds_to_nearest() -> None:
    weight, scale, _ = problem(8, 70, 100)
    hessian = torch.diag(torch.logspace(-2, 2, 70))
    assert torch.equal(GPTQ(hessian, 0.0, CHANNEL).round(weight, scale), quantize_rows(weight, scale))


def test_gptq_with_fewer_tokens_than_channels() -> None:
    weight, scale, hessian = problem(8, 64, 10)
    hessian[:, 7] = hessian[7] = 0  # a channel that never fires
    found = GPTQ(hessian.clone(), 0.0, CHANNEL).round(weight, scale) * scale[:, None]
    nearest = quantize_rows(weight, scale) * scale[:, None]
    assert torch.equal(found[:, 7], nearest[:, 7])
    assert error_under(hessian, found - weight) < error_under(hessian, nearest - weight)


def test_gptq_with_an_all_zero_hessian_matrix() -> None:
    weight, scale, _ = problem(8, 20, 30)
    found = GPTQ(torch.zeros(20, 20), 0.0, CHANNEL).round(weight, scale)
    assert torch.equal(found, quantize_rows(weight, scale))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_matrix_that_is_not_finite_is_refused(value: float) -> None:
    _, _, hessian = problem(4, 16, 40)
    hessian[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        GPTQ(hessian, 0.0, CHANNEL)
