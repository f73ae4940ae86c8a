"""W8A8 linears where the processor has no int8 products: against integer arithmetic in numpy, and in vLLM's choice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qtool.runtime import int8_kernel
from qtool.runtime.int8_kernel import MANY_TOKENS, Scale, scaled_product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, MANY_TOKENS - 1, MANY_TOKENS, 300])
@pytest.mark.parametrize("zero", [None, "one", "per token"])
@pytest.mark.parametrize("kept", [True, False])
def test_products_are_those_of_integers(dtype: torch.dtype, tokens: int, zero: str | None, kept: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    integers = torch.randint(-128, 128, (tokens, 200), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (96, 200), generator=generator, dtype=torch.int8)
    scale = torch.rand(96, generator=generator) * 0.01 + 1e-4
    scale = scale.bfloat16().float() if kept else scale
    shape = {None: None, "one": (1,), "per token": (tokens, 1)}[zero]
    zeros = None if shape is None else torch.randint(-128, 128, shape, generator=generator, dtype=torch.int32)
    found = scaled_product(integers, zeros, weight, Scale(scale), dtype).double().numpy()
    shifted = integers.numpy().astype(np.int64) - (0 if zeros is None else zeros.numpy())
    expected = (shifted @ weight.numpy().astype(np.int64).T) * scale.double().numpy()
    # exact integers, then one rounding to bfloat16, or two to float32
    rounding = 2.0**-8 if dtype == torch.bfloat16 and tokens < MANY_TOKENS else 2.0**-22
    np.testing.assert_allclose(found, expected, rtol=1.01 * rounding, atol=0)


@pytest.mark.vllm
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_layers(static: bool, symmetric: bool) -> None:
    """A layer of two that vLLM fuses: static, as vLLM's own kernel computes it; dynamic, near the float product.

    (vLLM's own dynamic ones saturate on the processors that this is for.)
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

    config = Int8ScaledMMLinearLayerConfig(
        is_channelwise=True, is_static_input_scheme=static, input_symmetric=symmetric
    )
    names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 128), generator=generator, dtype=torch.int8)
    scale = (torch.rand(64, 1, generator=generator) * 0.01).bfloat16().float()
    x, bias = torch.randn(40, 128, generator=generator).bfloat16(), torch.randn(64, generator=generator).bfloat16()

    def run(kind: Any) -> list[torch.Tensor]:
        layer: Any = torch.nn.Module()
        layer.logical_widths = [32, 32]
        layer.bias = None
        parameters = {"weight": weight.clone(), "weight_scale": scale.clone(), "azp_adj": None}
        parameters["input_scale"] = torch.tensor([0.02, 0.03]) if static else None
        zeros = static and not symmetric
        parameters["input_zero_point"] = torch.tensor([-9, 21], dtype=torch.int32) if zeros else None
        for name, tensor in parameters.items():
            made = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, made)
        kernel = kind(config, layer_param_names=names)
        torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
        try:
            kernel.process_weights_after_loading(layer)
        finally:
            torch.set_default_dtype(torch.float32)
        return [kernel.apply_weights(layer, rows, bias) for rows in (x, x[:3], x[None, :3])]

    found = run(int8_kernel.kernel())
    if static:
        expected, noise = run(CPUInt8ScaledMMLinearKernel), 2.0**-7
    else:
        product = x.float() @ (weight.float() * scale).t() + bias.float()
        expected, noise = [product.bfloat16(), product[:3].bfloat16(), product[None, :3].bfloat16()], 0.015
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(ours.float(), wanted.float(), rtol=2.0**-6, atol=noise * float(wanted.abs().max()))


def test_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu(flags: str) -> bool:
        text = f"processor\t: 0\nmodel name\t: X\nflags\t\t: fpu {flags} xsaves\nbugs\t\t: none\n"
        monkeypatch.setattr(int8_kernel, "Path", lambda _: SimpleNamespace(read_text=lambda: text))
        return int8_kernel.needed()

    monkeypatch.setattr(int8_kernel.platform, "machine", lambda: "x86_64")
    assert cpu("avx avx2 fma")
    assert not cpu("avx2 avx512f avx512_vnni")
    assert not cpu("avx2 avx_vnni")
    monkeypatch.setattr(int8_kernel.platform, "machine", lambda: "aarch64")
    assert not cpu("avx2")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("needed", "own", "name"),
    [
        (True, "", "ExactInt8LinearKernel"),
        (False, "", "CPUInt8ScaledMMLinearKernel"),
        (True, "Other", "ExactInt8LinearKernel"),
        (True, "Other,ExactInt8LinearKernel", "CPUInt8ScaledMMLinearKernel"),
    ],
)
def test_vllm_takes_it_where_it_is_needed(needed: bool, own: str, name: str) -> None:
    """As its plugin, by the entry point that qtool's package declares."""
    code = f"""
import os
os.environ["VLLM_DISABLED_KERNELS"] = {own!r}
from qtool.workers import hide_media_packages
hide_media_packages()
from qtool.runtime import int8_kernel
int8_kernel.needed = lambda: {needed}
from vllm.plugins import load_general_plugins
load_general_plugins()
int8_kernel.register()  # twice is once
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
print(type(init_int8_linear_kernel(True, False, True, "a test")).__name__)
"""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == name
