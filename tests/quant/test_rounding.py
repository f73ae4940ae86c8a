"""Error compensation against the plain formula that it abbreviates, and the search for clipping ratios."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant import rounding
from qtool.quant.integer import symmetric_scale

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)


def problem(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, its scales and the Gram matrix of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixing * torch.logspace(-1, 1, width)
    return weight, symmetric_scale(weight.abs().amax(dim=1)) * 4, x.t() @ x / tokens


def optimal_brain(weight: np.ndarray, scale: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in a fixed order: round a column, correct the rest, shrink the explicit inverse."""
    work = weight.copy()
    quantized = np.zeros_like(work)
    inverse = np.linalg.inv(hessian)
    for column in np.argsort(-np.diag(hessian), kind="stable"):
        quantized[:, column] = np.clip(np.round(work[:, column] / scale), -128, 127)
        error = (work[:, column] - quantized[:, column] * scale) / inverse[column, column]
        work -= np.outer(error, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return quantized


def quantize_rows(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounding to nearest, int8."""
    return torch.from_numpy(np.clip(np.round(weight.numpy() / scale.numpy()[:, None]), -128, 127).astype(np.int8))


def error_under(gram: torch.Tensor, delta: torch.Tensor) -> float:
    return float((delta.double() @ gram.double() * delta.double()).sum())


@pytest.mark.parametrize("width", [5, 64, 150])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_gptq_is_optimal_brain_quantization(width: int, ridge: float) -> None:
    weight, scale, gram = problem(12, width, 4 * width)
    damped = gram.double().numpy() + max(ridge, 1e-3 * float(gram.diagonal().mean())) * np.eye(width)
    expected = optimal_brain(weight.double().numpy(), scale.double().numpy(), damped)
    found = rounding.Compensation(gram.clone(), ridge).round(weight, scale)
    assert found.dtype == torch.int8
    # where float32 meets a tie it may round the other way, and what follows in that row differs with it
    assert (found.numpy() == expected).mean() >= 0.98
    ours = error_under(torch.from_numpy(damped), found * scale[:, None] - weight)
    theirs = error_under(torch.from_numpy(damped), torch.from_numpy(expected).float() * scale[:, None] - weight)
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_errs_less_than_rounding_to_nearest(seed: int) -> None:
    weight, scale, gram = problem(16, 96, 200, seed)
    nearest = quantize_rows(weight, scale) * scale[:, None] - weight
    compensated = rounding.Compensation(gram.clone(), 0.0).round(weight, scale) * scale[:, None] - weight
    assert error_under(gram, compensated) < 0.8 * error_under(gram, nearest)


def test_gptq_on_uncorrelated_inputs_rounds_to_nearest() -> None:
    weight, scale, _ = problem(8, 70, 100)
    gram = torch.diag(torch.logspace(-2, 2, 70))
    assert torch.equal(rounding.Compensation(gram, 0.0).round(weight, scale), quantize_rows(weight, scale))


def test_gptq_with_fewer_tokens_than_channels() -> None:
    weight, scale, gram = problem(8, 64, 10)
    gram[:, 7] = gram[7] = 0  # a channel that never fires
    found = rounding.Compensation(gram.clone(), 0.0).round(weight, scale) * scale[:, None]
    nearest = quantize_rows(weight, scale) * scale[:, None]
    assert torch.equal(found[:, 7], nearest[:, 7])
    assert error_under(gram, found - weight) < error_under(gram, nearest - weight)


def test_gptq_with_an_all_zero_gram_matrix() -> None:
    weight, scale, _ = problem(8, 20, 30)
    found = rounding.Compensation(torch.zeros(20, 20), 0.0).round(weight, scale)
    assert torch.equal(found, quantize_rows(weight, scale))


@pytest.mark.parametrize("kind", ["tokens", "energy"])
def test_search_clip_takes_the_best_ratio_of_every_row(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 40, generator=generator) ** 3  # long tails: clipping pays
    x = torch.randn(50, 40, generator=generator)
    x[:, 20:] *= 0.02
    weight[::2, 30] = 30.0  # an outlier that little input meets
    if kind == "tokens":
        row_error: rounding.RowError = rounding.ErrorOnTokens(x)
    else:
        row_error = rounding.ErrorByEnergy(x.square().mean(dim=0))
    scales, bounds = rounding.search_clip(weight, row_error, RATIOS, lambda scale: scale)
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
    weight, _, _ = problem(6, 32, 10)

    def stored(scale: torch.Tensor) -> torch.Tensor:
        return scale.to(torch.bfloat16).float()

    scales, _ = rounding.search_clip(weight, rounding.ErrorByEnergy(torch.ones(32)), RATIOS, stored)
    assert torch.equal(scales, stored(scales))
    scales, bounds = rounding.search_clip(weight, rounding.ErrorByEnergy(torch.ones(32)), (1.0,), stored)
    assert torch.equal(bounds, weight.abs().amax(dim=1))
    assert torch.equal(scales, stored(symmetric_scale(bounds)))


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 16)
    weight[1] = 1.0
    scales, bounds = rounding.search_clip(weight, rounding.ErrorByEnergy(torch.ones(16)), RATIOS, lambda scale: scale)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert not rounding.integers_within(weight, scales, bounds)[0].any()


def test_clamp_rows() -> None:
    weight, _, _ = problem(4, 9, 10)
    bound = torch.tensor([0.1, 0.5, 1.0, 9.0])
    expected = np.clip(weight.numpy(), -bound.numpy()[:, None], bound.numpy()[:, None])
    np.testing.assert_array_equal(rounding.clamp_rows(weight, bound).numpy(), expected)


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.55, 127 / 127.5])
def test_integers_within_are_those_of_clamped_values(ratio: float) -> None:
    weight, _, _ = problem(40, 90, 10)
    bound = weight.abs().amax(dim=1) * ratio
    scale = symmetric_scale(bound)
    clamped = np.clip(weight.numpy(), -bound.numpy()[:, None], bound.numpy()[:, None])
    expected = np.clip(np.round(clamped / scale.numpy()[:, None]), -128, 127)
    np.testing.assert_array_equal(rounding.integers_within(weight, scale, bound).numpy(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(value: float) -> None:
    _, _, gram = problem(4, 16, 40)
    gram[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        rounding.Compensation(gram, 0.0)
