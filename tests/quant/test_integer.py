"""The integer arithmetic against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant import integer


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_symmetric_scale() -> None:
    amax = values(7).abs()
    expected = (2 * amax.numpy().astype(np.float64) / 255).astype(np.float32)
    np.testing.assert_array_equal(integer.symmetric_scale(amax).numpy(), expected)


def test_scales_of_zeros_are_one() -> None:
    assert integer.symmetric_scale(torch.zeros(2)).tolist() == [1.0, 1.0]
    scale, offset = integer.asymmetric_scale_offset(torch.tensor(0.0), torch.tensor(0.0))
    assert (float(scale), float(offset)) == (1.0, -128.0)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 4.0), (-3.0, 0.25), (0.5, 2.0), (-2.0, -0.5)])
def test_asymmetric_scale_and_offset(low: float, high: float) -> None:
    scale, offset = integer.asymmetric_scale_offset(torch.tensor(low), torch.tensor(high))
    bottom, top = min(low, 0.0), max(high, 0.0)
    assert float(scale) == np.float32((top - bottom) / 255)
    assert float(offset) == np.round(-128 - bottom / ((top - bottom) / 255))
    # both ends of the range are representable to half a step, and zero exactly
    ends = torch.tensor([bottom, top, 0.0])
    back = integer.fake_quantize_tensor(ends, scale, offset)
    assert (back - ends).abs().max() <= float(scale) * 0.5001
    assert float(back[2]) == 0.0


def quantized_weight(rows: int, width: int) -> tuple[integer.QuantizedWeight, np.ndarray]:
    """A rounded weight, and what it represents in float64."""
    weight = values(rows, width)
    found = integer.QuantizedWeight.of(weight.clone())
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
    expected = integer.fake_quantize_tokens(x).double().numpy() @ represented.T
    np.testing.assert_allclose(integer.per_token_product(x.clone(), weight).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_per_tensor_product() -> None:
    weight, represented = quantized_weight(24, 40)
    x = values(18, 40) + 0.3
    scale, offset = integer.asymmetric_scale_offset(x.amin(), x.amax())
    expected = integer.fake_quantize_tensor(x, scale, offset).double().numpy() @ represented.T
    found = integer.per_tensor_product(x.clone(), scale, offset, weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_tokens() -> None:
    x = values(2, 9, 40)
    x[0, 3] = 0
    given = x.clone()
    # in float32: the largest value is 127.5 steps, and which way that rounds is float32's to decide
    step = (2 * np.abs(x.numpy()).max(-1, keepdims=True).astype(np.float64) / 255).astype(np.float32)
    step[step == 0] = 1
    expected = np.clip(np.round(x.numpy() / step), -128, 127) * step
    np.testing.assert_array_equal(integer.fake_quantize_tokens(x).numpy(), expected)
    assert torch.equal(x, given)


def test_tensor() -> None:
    x = values(6, 40)
    scale, offset = torch.tensor(0.02), torch.tensor(-17.0)
    given = x.clone()
    expected = (np.clip(np.round(x.numpy() / np.float32(0.02) - 17), -128, 127) + 17) * np.float32(0.02)
    np.testing.assert_allclose(integer.fake_quantize_tensor(x, scale, offset).numpy(), expected, rtol=1e-6)
    assert torch.equal(x, given)
