"""Linears whose weights alone are integers, for vLLM on CPUs: against products of floats in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qtool.runtimes.kernels import weight_only

FOR_AVX2 = pytest.mark.skipif(not weight_only.vectorized(), reason="torch's products are for AVX2")


def integers(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("fast", [pytest.param(True, marks=FOR_AVX2), False])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("bits", "sizes", "groups"),
    [
        (4, (48, 128), 4),  # groups of 32
        (4, (48, 192), 2),  # of 96: three of 32
        (4, (64, 256), 1),  # a channel
        (4, (64, 128), 8),  # of 16, which torch's product doesn't take
        (4, (20, 128), 2),  # outputs that it doesn't take
        (8, (48, 128), 1),
        (8, (48, 128), 4),
    ],
)
def test_products(
    fast: bool, tokens: int, zero: bool, bits: int, sizes: tuple[int, int], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_only, "vectorized", lambda: fast)
    monkeypatch.setattr(weight_only, "_CHUNK", 1 << 11)  # several parts
    weight, zeros = integers(sizes, bits, 0), integers((sizes[0], groups), bits, 1) if zero else None
    generator = torch.Generator().manual_seed(2)
    scale = (torch.rand(sizes[0], groups, generator=generator) * 0.01 + 0.001).bfloat16().float()
    x = torch.randn(tokens, sizes[1], generator=generator).bfloat16()
    found = weight_only.product(weight, scale, zeros, bits)(x).double().numpy()
    shifted = weight.double().numpy().reshape(sizes[0], groups, -1)
    shifted = shifted - (0 if zeros is None else zeros.double().numpy()[:, :, None])
    dequantized = (shifted * scale.double().numpy()[:, :, None]).reshape(sizes)
    expected = x.double().numpy() @ dequantized.T
    # bfloat16 has eight bits; a zero point times a scale is rounded to it as well
    np.testing.assert_allclose(found, expected, rtol=2.0**-7, atol=(2.0**-7 if fast else 1e-6) * np.abs(expected).max())


@pytest.mark.vllm
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("zero", [False, True])
def test_layers(form: str, zero: bool) -> None:
    """The parameters as vLLM's own layers have them."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32 as pack
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4 if zero else scalar_types.uint4b8
    weight, zeros = integers((48, 128), 4, 0), integers((48, 4), 4, 1)
    scale = torch.rand(48, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    turned = form == "gptq"
    layer: Any = torch.nn.Module()

    def add(name: str, tensor: torch.Tensor, **places: int) -> None:
        parameter = torch.nn.Parameter(tensor.t().contiguous() if turned else tensor, requires_grad=False)
        for place, value in places.items():
            setattr(parameter, place, 1 - value if turned else value)
        layer.register_parameter(name, parameter)

    add("weight", pack(weight + 8, kind, 1), output_dim=0, input_dim=1, packed_dim=1)
    add("scale", scale, output_dim=0, input_dim=1)
    add("zero", pack(zeros + 8, kind, 0), output_dim=0, input_dim=1, packed_dim=0)
    config = MPLinearLayerConfig((128, 48), (128, 48), kind, torch.bfloat16, 32, zero)
    kernel = weight_only.kernel()(config, "weight", "scale", "zero" if zero else None)
    kernel.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 3, 128).bfloat16(), torch.randn(48).bfloat16()
    found = kernel.apply_weights(layer, x, bias)
    groups = weight.float().unflatten(1, (4, -1)) - (zeros[:, :, None] if zero else 0)
    expected = x.float() @ (groups * scale.float()[:, :, None]).flatten(1).t() + bias.float()
    assert (found.dtype, found.shape) == (x.dtype, expected.shape)
    torch.testing.assert_close(found.float(), expected, rtol=2.0**-6, atol=2.0**-7 * float(expected.abs().max()))
