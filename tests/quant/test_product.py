"""Products of integers against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant import integer
from qtool.quant.product import INT8, QuantizedWeight, Range, asymmetric_product, per_token_product
from qtool.quant.transforms.diagonal import smoothing_scale
from qtool.scheme import QuantizationArgs

CHANNEL = QuantizationArgs()
TENSOR = QuantizationArgs(strategy="tensor", symmetric=False)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized_weight(rows: int, width: int) -> tuple[QuantizedWeight, np.ndarray]:
    """A rounded weight, and what it represents in float64."""
    weight = values(rows, width)
    found = QuantizedWeight.of(weight.clone(), CHANNEL)
    # in float32: the largest value is 127.5 steps, and which way that rounds is float32's to decide
    scale = (2 * np.abs(weight.numpy()).max(1).astype(np.float64) / 255).astype(np.float32)
    integers = np.clip(np.round(weight.numpy() / scale[:, None]), -128, 127)
    assert found.integers.dtype == torch.int8
    np.testing.assert_array_equal(found.integers.numpy(), integers)
    np.testing.assert_array_equal(found.scale.numpy(), scale)
    np.testing.assert_array_equal(found.sums.numpy(), integers.sum(axis=1))
    return found, integers.astype(np.float64) * scale.astype(np.float64)[:, None]


def test_per_token_product() -> None:
    weight, represented = quantized_weight(24, 40)
    x = values(18, 40)
    expected = integer.fake_quantize_tokens(x, INT8).double().numpy() @ represented.T
    np.testing.assert_allclose(per_token_product(x.clone(), weight, INT8).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [None, 1], ids=["tensor", "tokens"])
def test_asymmetric_product(dim: int | None) -> None:
    weight, represented = quantized_weight(24, 40)
    x = values(18, 40) + 0.3
    low, high = x.aminmax() if dim is None else x.aminmax(dim=dim, keepdim=True)
    input_range = Range(*integer.asymmetric_parameters(low, high, TENSOR))
    expected = integer.fake_quantize_tensor(x, *input_range, TENSOR).double().numpy() @ represented.T
    found = asymmetric_product(x.clone(), input_range, weight, TENSOR)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_products_of_what_is_smoothed(static: bool) -> None:
    x, weight = values(40, 16) * torch.logspace(-1, 1.2, 16) + 0.1, values(24, 16, seed=1)
    s = smoothing_scale(x.abs().amax(dim=0), weight.abs().amax(dim=0), 0.6)
    smooth = (x / s).numpy()
    if static:
        low, high = (x / s).aminmax()
        input_range = Range(*integer.asymmetric_parameters(low, high, TENSOR))
        found = asymmetric_product(x / s, input_range, QuantizedWeight.of(weight * s, CHANNEL), TENSOR)
        step = np.float32((float(smooth.max()) - float(smooth.min())) / 255)
        offset = np.round(-128 - float(smooth.min()) / ((float(smooth.max()) - float(smooth.min())) / 255))
        noisy = (np.clip(np.round(smooth / step + np.float32(offset)), -128, 127) - offset) * float(step)
    else:
        found = per_token_product(x / s, QuantizedWeight.of(weight * s, CHANNEL), INT8)
        steps = (2 * np.abs(smooth).max(1, keepdims=True).astype(np.float64) / 255).astype(np.float32)
        noisy = np.clip(np.round(smooth / steps), -128, 127) * steps.astype(np.float64)
    smooth_w = (weight * s).numpy()
    w_steps = (2 * np.abs(smooth_w).max(1, keepdims=True).astype(np.float64) / 255).astype(np.float32)
    noisy_w = np.clip(np.round(smooth_w / w_steps), -128, 127) * w_steps.astype(np.float64)
    np.testing.assert_allclose(found.numpy(), noisy @ noisy_w.T, rtol=1e-4, atol=1e-4 * np.abs(noisy @ noisy_w.T).max())
