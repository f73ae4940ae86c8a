"""Smoothing scales, their noise model against an independent one with autograd, and the search for the best."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant import smoothing
from qtool.quant.integer import QuantizedWeight, asymmetric_scale_offset, per_tensor_product, per_token_product
from qtool.quant.smoothing import NoiseModel

TOKENS, OUT, WIDTH = 40, 24, 16


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, in] with loud channels, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator) * torch.logspace(-1, 1.2, WIDTH)
    return x + 0.1, torch.randn(OUT, WIDTH, generator=generator)


def noise_model(x: torch.Tensor, weight: torch.Tensor, *, static: bool, compensation: float = 1.0) -> NoiseModel:
    energy = x.square().mean(dim=0)
    return NoiseModel(x, weight, x.amin(dim=0), x.amax(dim=0), energy, static=static, compensation=compensation)


def expected_error(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor, static: bool, rest: float) -> torch.Tensor:
    """The expected squared output error per token when rounding adds noise of variance step²/12; float64."""
    smooth_x, smooth_w = x / t.exp(), w * t.exp()
    if static:
        high, low = smooth_x.amax().clamp(min=0), smooth_x.amin().clamp(max=0)
        steps = ((high - low) / 255).expand(len(x))
    else:
        steps = 2 * smooth_x.abs().amax(dim=1) / 255
    row_steps = 2 * smooth_w.abs().amax(dim=1) / 255
    from_inputs = (steps**2 / 12).mean() * (smooth_w**2).sum()
    from_weights = (row_steps**2 / 12).sum() * (smooth_x**2).mean(dim=0).sum()
    return from_inputs + rest * from_weights


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("compensation", [1.0, 0.3])
def test_noise_model_is_the_expected_error(static: bool, compensation: float) -> None:
    x, weight = data()
    model = noise_model(x, weight, static=static, compensation=compensation)
    generator = torch.Generator().manual_seed(9)
    ratios = []
    for _ in range(5):
        t = torch.randn(WIDTH, generator=generator) * 0.7
        true = expected_error(x.double(), weight.double(), t.double(), static, compensation)
        ratios.append(model.error(t) / float(true))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("compensation", [1.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient(static: bool, compensation: float, seed: int) -> None:
    x, weight = data(seed)
    t = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.5
    model = noise_model(x, weight, static=static, compensation=compensation)
    model.focus(t)
    found = model.gradient(t)
    variable = t.double().requires_grad_(True)
    expected_error(x.double(), weight.double(), variable, static, compensation).log().backward()
    assert variable.grad is not None
    torch.testing.assert_close(found.double(), variable.grad, rtol=1e-3, atol=1e-5)


def test_the_model_predicts_real_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2000, 64, generator=generator), torch.randn(64, 64, generator=generator)
    real = x.double() @ weight.double().t()
    s = torch.ones(64)
    rounded = per_token_product(x.clone(), QuantizedWeight.of(weight.clone()))
    measured = float((rounded - real).square().sum(dim=1).mean())
    predicted = float(expected_error(x.double(), weight.double(), s.log().double(), False, 1.0))
    assert measured == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("static", [False, True])
def test_fit_beats_every_alpha(static: bool) -> None:
    x, weight = data()
    act_max, w_max = x.abs().amax(dim=0), weight.abs().amax(dim=0)
    found = smoothing.fit(noise_model(x, weight, static=static), act_max, w_max, torch.arange(WIDTH))
    by_alpha = []
    for step in range(20):
        s = act_max.double() ** (step / 20) / w_max.double() ** (1 - step / 20)
        by_alpha.append(float(expected_error(x.double(), weight.double(), s.log(), static, 1.0)))
    assert expected_error(x.double(), weight.double(), found.s.double().log(), static, 1.0) < 0.99 * min(by_alpha)


def test_fit_shares_s_among_channels_of_one_producer_channel() -> None:
    x, weight = data()
    channel_map = torch.arange(WIDTH) // 2
    act_max, w_max = (v.abs().amax(dim=0).view(-1, 2).amax(dim=1).repeat_interleave(2) for v in (x, weight))
    s = smoothing.fit(noise_model(x, weight, static=False), act_max, w_max, channel_map).s
    assert torch.equal(s[::2], s[1::2])
    assert len(s.unique()) > 2


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 0.95])
def test_scale(alpha: float) -> None:
    x, weight = data()
    act_max, w_max = x.abs().amax(dim=0), weight.abs().amax(dim=0)
    act_max[3] = 0
    w_max[5] = 0
    act_max[7] = 1e-30
    with np.errstate(divide="ignore"):
        expected = np.maximum(act_max.double().numpy() ** alpha / w_max.double().numpy() ** (1 - alpha), 1e-5)
    expected[[3, 5]] = 1
    np.testing.assert_allclose(smoothing.scale(act_max, w_max, alpha).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_quantized_product(static: bool) -> None:
    x, weight = data()
    s = smoothing.scale(x.abs().amax(dim=0), weight.abs().amax(dim=0), 0.6)
    smooth = (x / s).numpy()
    if static:
        range_ = asymmetric_scale_offset(*(x / s).aminmax())
        found = per_tensor_product(x / s, *range_, QuantizedWeight.of(weight * s))
        step = np.float32((float(smooth.max()) - float(smooth.min())) / 255)
        offset = np.round(-128 - float(smooth.min()) / ((float(smooth.max()) - float(smooth.min())) / 255))
        noisy = (np.clip(np.round(smooth / step + np.float32(offset)), -128, 127) - offset) * float(step)
    else:
        found = per_token_product(x / s, QuantizedWeight.of(weight * s))
        steps = (2 * np.abs(smooth).max(1, keepdims=True).astype(np.float64) / 255).astype(np.float32)
        noisy = np.clip(np.round(smooth / steps), -128, 127) * steps.astype(np.float64)
    smooth_w = (weight * s).numpy()
    w_steps = (2 * np.abs(smooth_w).max(1, keepdims=True).astype(np.float64) / 255).astype(np.float32)
    noisy_w = np.clip(np.round(smooth_w / w_steps), -128, 127) * w_steps.astype(np.float64)
    np.testing.assert_allclose(found.numpy(), noisy @ noisy_w.T, rtol=1e-4, atol=1e-4 * np.abs(noisy @ noisy_w.T).max())
