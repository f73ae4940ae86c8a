"""The integer arithmetic against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant import integer
from qtool.quant.types import dequantize
from qtool.scheme import QuantizationArgs

TENSOR = QuantizationArgs(strategy="tensor", symmetric=False)
TOKEN = QuantizationArgs(strategy="token", dynamic=True)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_symmetric_scale() -> None:
    amax = values(7).abs()
    expected = (2 * amax.numpy().astype(np.float64) / 255).astype(np.float32)
    np.testing.assert_array_equal(integer.symmetric_scale(amax, TOKEN).numpy(), expected)


def test_scales_of_zeros_are_one() -> None:
    assert integer.symmetric_scale(torch.zeros(2), TOKEN).tolist() == [1.0, 1.0]
    scale, zero_point = integer.asymmetric_parameters(torch.tensor(0.0), torch.tensor(0.0), TENSOR)
    assert (float(scale), float(zero_point)) == (1.0, -128.0)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 4.0), (-3.0, 0.25), (0.5, 2.0), (-2.0, -0.5)])
def test_asymmetric_scale_and_zero_point(low: float, high: float) -> None:
    scale, zero_point = integer.asymmetric_parameters(torch.tensor(low), torch.tensor(high), TENSOR)
    bottom, top = min(low, 0.0), max(high, 0.0)
    assert float(scale) == np.float32((top - bottom) / 255)
    assert float(zero_point) == np.round(-128 - bottom / ((top - bottom) / 255))
    # both ends of the range are representable to half a step, and zero exactly
    ends = torch.tensor([bottom, top, 0.0])
    back = integer.fake_quantize_tensor(ends, scale, zero_point, TENSOR)
    assert (back - ends).abs().max() <= float(scale) * 0.5001
    assert float(back[2]) == 0.0


def test_tokens() -> None:
    x = values(2, 9, 40)
    x[0, 3] = 0
    given = x.clone()
    # in float32: the largest value is 127.5 steps, and which way that rounds is float32's to decide
    step = (2 * np.abs(x.numpy()).max(-1, keepdims=True).astype(np.float64) / 255).astype(np.float32)
    step[step == 0] = 1
    expected = np.clip(np.round(x.numpy() / step), -128, 127) * step
    np.testing.assert_array_equal(integer.fake_quantize_tokens(x, TOKEN).numpy(), expected)
    assert torch.equal(x, given)


def test_tensor() -> None:
    x = values(6, 40)
    scale, zero_point = torch.tensor(0.02), torch.tensor(-17.0)
    given = x.clone()
    expected = (np.clip(np.round(x.numpy() / np.float32(0.02) - 17), -128, 127) + 17) * np.float32(0.02)
    np.testing.assert_allclose(integer.fake_quantize_tensor(x, scale, zero_point, TENSOR).numpy(), expected, rtol=1e-6)
    assert torch.equal(x, given)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_tokens_of_few_bits_are_those_of_compressed_tensors(num_bits: int, symmetric: bool) -> None:
    from compressed_tensors.quantization import QuantizationArgs as TheirArgs
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = values(9, 40) + (0 if symmetric else 0.7)
    theirs = TheirArgs(num_bits=num_bits, strategy="token", symmetric=symmetric, dynamic=True)
    scale, zero = calculate_qparams(x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True), theirs)
    args = QuantizationArgs(num_bits=num_bits, strategy="token", symmetric=symmetric, dynamic=True)
    found = integer.InputQuantizer(args)(x)
    torch.testing.assert_close(found, fake_quantize(x, scale, zero, theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_tensors_of_few_bits_are_those_of_compressed_tensors(num_bits: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs as TheirArgs
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = values(9, 40) + 0.4
    theirs = TheirArgs(num_bits=num_bits, strategy="tensor", symmetric=False)
    their_scale, their_zero = calculate_qparams(x.amin()[None], x.amax()[None], theirs)
    args = QuantizationArgs(num_bits=num_bits, strategy="tensor", symmetric=False)
    scale, zero_point = integer.asymmetric_parameters(x.amin(), x.amax(), args)
    torch.testing.assert_close(scale, their_scale[0])
    assert int(zero_point) == int(their_zero[0])
    found = integer.InputQuantizer(args, float(scale), int(zero_point))(x)
    torch.testing.assert_close(found, fake_quantize(x, their_scale, their_zero, theirs), rtol=1e-5, atol=1e-6)


def test_an_input_that_stays_float() -> None:
    x = values(3, 4)
    assert integer.InputQuantizer(None)(x) is x


@pytest.mark.parametrize(
    "args",
    [
        QuantizationArgs(strategy="tensor"),
        QuantizationArgs(strategy="group", group_size=16, dynamic=True),
        QuantizationArgs(strategy="tensor", type="float"),
    ],
)
def test_inputs_that_nobody_quantizes(args: QuantizationArgs) -> None:
    with pytest.raises(ValueError, match="can't quantize"):
        integer.InputQuantizer(args)


def test_dequantize() -> None:
    integers = torch.arange(-12, 12, dtype=torch.int8).view(4, 6)
    by_row, by_group = values(4).abs(), values(4, 3).abs()
    np.testing.assert_array_equal(
        dequantize(integers, by_row, QuantizationArgs()), integers.numpy() * by_row.numpy()[:, None]
    )
    np.testing.assert_array_equal(
        dequantize(integers, by_row[:1], QuantizationArgs(strategy="tensor")), integers.numpy() * by_row.numpy()[0]
    )
    groups = QuantizationArgs(strategy="group", group_size=2)
    expected = integers.numpy() * by_group.numpy().repeat(2, axis=1)
    np.testing.assert_array_equal(dequantize(integers, by_group, groups), expected)
