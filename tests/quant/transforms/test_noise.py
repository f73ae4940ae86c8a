"""The noise model against an independent one with autograd, and against real rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qtool.quant.importance import Importance
from qtool.quant.product import INT8, QuantizedWeight, per_token_product
from qtool.quant.statistics import InputStatistics
from qtool.quant.transforms.noise import NoiseModel, WeightSample
from qtool.scheme import W8A8, W8A8_ASYMMETRIC, W8A8_DYNAMIC, QuantizationArgs, Scheme

INT4_GROUPS = QuantizationArgs(num_bits=4, strategy="group", group_size=4)
SCHEMES = {
    "W8A8-dynamic": W8A8_DYNAMIC,
    "W8A8-asymmetric": W8A8_ASYMMETRIC,
    "W8A8": W8A8,
    "W4A8-dynamic": Scheme(QuantizationArgs(num_bits=4), W8A8_DYNAMIC.activations),
    "W4A8 by group": Scheme(INT4_GROUPS, W8A8.activations),
    "W4A16 by group": Scheme(INT4_GROUPS, None),
}
TOKENS, OUT, WIDTH = 40, 24, 16


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, in] with loud channels, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator) * torch.logspace(-1, 1.2, WIDTH)
    return x + 0.1, torch.randn(OUT, WIDTH, generator=generator)


def noise_model(x: torch.Tensor, weight: torch.Tensor, scheme: Scheme) -> NoiseModel:
    seen = InputStatistics(stride=1, with_hessian=False)
    seen.update(x)
    return NoiseModel(seen.smoothed(None), WeightSample(weight, weight.square().sum(dim=0)), scheme)


def expected_error(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The expected squared output error per token when rounding adds noise of variance step²/12; float64."""
    smooth_x, smooth_w = x / t.exp(), w * t.exp()
    from_inputs: Any = 0.0
    if scheme.activations is not None:
        levels = 2**scheme.activations.num_bits - 1
        if scheme.activations.symmetric:
            steps = 2 * smooth_x.abs().amax(dim=1) / levels
        else:
            sharing = smooth_x if scheme.activations.dynamic else smooth_x.reshape(1, -1)
            high, low = sharing.amax(dim=1).clamp(min=0), sharing.amin(dim=1).clamp(max=0)
            steps = ((high - low) / levels).expand(len(x))
        from_inputs = (steps**2 / 12).mean() * (smooth_w**2).sum()
    size = scheme.weights.group_size or w.shape[1]
    from_weights: Any = 0.0
    for some_w, some_x in zip(smooth_w.split(size, dim=1), smooth_x.split(size, dim=1), strict=True):
        row_steps = 2 * some_w.abs().amax(dim=1) / (2**scheme.weights.num_bits - 1)
        from_weights += (row_steps**2 / 12).sum() * (some_x**2).mean(dim=0).sum()
    return from_inputs + from_weights


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_noise_model_is_the_expected_error(scheme: Scheme) -> None:
    x, weight = data()
    model = noise_model(x, weight, scheme)
    generator = torch.Generator().manual_seed(9)
    ratios = []
    for _ in range(5):
        t = torch.randn(WIDTH, generator=generator) * 0.7
        true = expected_error(x.double(), weight.double(), t.double(), scheme)
        ratios.append(float(model.error(t)) / float(true))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient(scheme: Scheme, seed: int) -> None:
    x, weight = data(seed)
    t = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.5
    model = noise_model(x, weight, scheme)
    model.focus(t)
    found = model.gradient(t)
    variable = t.double().requires_grad_(True)
    expected_error(x.double(), weight.double(), variable, scheme).log().backward()
    assert variable.grad is not None
    torch.testing.assert_close(found.double(), variable.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheme", [W8A8_DYNAMIC, W8A8_ASYMMETRIC, W8A8], ids=lambda scheme: scheme.label)
def test_gradient_where_tokens_and_rows_matter_unequally(scheme: Scheme) -> None:
    """A token or row of whole weight n counts like n of them."""
    x, weight = data()
    times, rows = torch.arange(TOKENS) % 3 + 1, torch.arange(OUT) % 4 + 1
    seen = InputStatistics(stride=1, with_hessian=False, importance=Importance(times.float(), rows.float()))
    seen.update(x)
    sample = WeightSample(weight, rows.float() @ weight.square(), importance=rows.float())
    model = NoiseModel(seen.smoothed(None), sample, scheme)
    t = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) * 0.5
    model.focus(t)
    found = model.gradient(t)
    variable = t.double().requires_grad_(True)
    repeated = x.double().repeat_interleave(times, dim=0), weight.double().repeat_interleave(rows, dim=0)
    expected_error(*repeated, variable, scheme).log().backward()
    assert variable.grad is not None
    torch.testing.assert_close(found.double(), variable.grad, rtol=1e-3, atol=1e-5)


def test_the_model_predicts_real_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2000, 64, generator=generator), torch.randn(64, 64, generator=generator)
    real = x.double() @ weight.double().t()
    s = torch.ones(64)
    rounded = per_token_product(x.clone(), QuantizedWeight.of(weight.clone(), INT8), INT8)
    measured = float((rounded - real).square().sum(dim=1).mean())
    predicted = float(expected_error(x.double(), weight.double(), s.log().double(), W8A8_DYNAMIC))
    assert measured == pytest.approx(predicted, rel=0.05)
