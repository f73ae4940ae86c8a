"""W8A8 linears where the processor has no int8 products: against integer arithmetic in numpy, and in vLLM's choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.environments import machine
from qtool.runtimes import kernels, settings
from qtool.runtimes.kernels import int8
from qtool.runtimes.kernels.int8 import MANY_TOKENS, Scale, scaled_product

REPOSITORY = Path(__file__).resolve().parents[2]
# torch 2.13's product of bfloat16 with int8 weights gives garbage on processors with AMX, where qtool doesn't take it.
AS_AVX2 = os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"
FOR_AVX2 = pytest.mark.skipif("amx_int8" in machine.cpu_flags() and not AS_AVX2, reason="its torch product is for AVX2")


@FOR_AVX2
@pytest.mark.parametrize("tokens", [1, 7, MANY_TOKENS - 1, MANY_TOKENS, 300])
@pytest.mark.parametrize("zero", [None, "one", "per token"])
@pytest.mark.parametrize("kept", [True, False])
def test_products_are_those_of_integers(tokens: int, zero: str | None, kept: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    integers = torch.randint(-128, 128, (tokens, 200), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (96, 200), generator=generator, dtype=torch.int8)
    scale = torch.rand(96, generator=generator) * 0.01 + 1e-4
    scale = scale.bfloat16().float() if kept else scale
    shape = {None: None, "one": (1,), "per token": (tokens, 1)}[zero]
    zeros = None if shape is None else torch.randint(-128, 128, shape, generator=generator, dtype=torch.int32)
    found = scaled_product(integers, zeros, weight, Scale(scale)).double().numpy()
    shifted = integers.numpy().astype(np.int64) - (0 if zeros is None else zeros.numpy())
    expected = (shifted @ weight.numpy().astype(np.int64).T) * scale.double().numpy()
    # exact integers, then one rounding to bfloat16, or two to float32
    rounding = 2.0**-8 if tokens < MANY_TOKENS else 2.0**-22
    np.testing.assert_allclose(found, expected, rtol=1.01 * rounding, atol=0)


@FOR_AVX2
@pytest.mark.vllm
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_layers(static: bool, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of two that vLLM fuses: static, as vLLM's own kernel computes it; dynamic, near the float product.

    (vLLM's own dynamic ones saturate on the processors that this is for.)
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

    # where there are AMX tiles, vLLM's kernel computes something else: per token, even for static layers
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
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

    found = run(int8.kernel())
    if static:
        expected, noise = run(CPUInt8ScaledMMLinearKernel), 2.0**-7
    else:
        product = x.float() @ (weight.float() * scale).t() + bias.float()
        expected, noise = [product.bfloat16(), product[:3].bfloat16(), product[None, :3].bfloat16()], 0.015
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(ours.float(), wanted.float(), rtol=2.0**-6, atol=noise * float(wanted.abs().max()))


REPOSITORY = Path(__file__).resolve().parents[2]
# torch 2.13's product of bfloat16 with int8 weights gives garbage on processors with AMX, where qtool doesn't take it.
AS_AVX2 = os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"
FOR_AVX2 = pytest.mark.skipif("amx_int8" in machine.cpu_flags() and not AS_AVX2, reason="its torch product is for AVX2")


@pytest.mark.vllm
@pytest.mark.skipif("amx_int8" not in machine.cpu_flags(), reason="the product is for AMX")
def test_rows_in_three_dimensions() -> None:
    """Models that vLLM runs through transformers' code have [1, tokens, in], which its own product refuses."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

    kernels.register()
    kernels.register()  # once more changes nothing
    config = Int8ScaledMMLinearLayerConfig(is_channelwise=True, is_static_input_scheme=False, input_symmetric=True)
    generator = torch.Generator().manual_seed(0)
    layer: Any = torch.nn.Module()
    layer.bias, layer.logical_widths = None, [64]
    weight = torch.randint(-127, 128, (64, 128), generator=generator, dtype=torch.int8)
    scale = torch.rand(64, 1, generator=generator) * 0.01
    parameters = {"weight": weight.clone(), "weight_scale": scale.clone(), "input_scale": None}
    for name, tensor in (parameters | {"input_zero_point": None, "azp_adj": None}).items():
        made = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, made)
    kernel = CPUInt8ScaledMMLinearKernel(
        config, ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    )
    kernel.process_weights_after_loading(layer)
    x = torch.randn(2, 3, 128, generator=generator).bfloat16()
    found, flat = kernel.apply_weights(layer, x), kernel.apply_weights(layer, x.reshape(6, 128))
    assert found.shape == (2, 3, 64)
    assert torch.equal(found.reshape(6, 64), flat)
    expected = x.float() @ (weight.float() * scale).t()
    torch.testing.assert_close(found.float(), expected, rtol=2.0**-6, atol=0.015 * float(expected.abs().max()))


def test_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu(flags: str) -> bool:
        monkeypatch.setattr(machine, "cpu_flags", lambda: set(flags.split()))
        return int8.needed()

    assert cpu("avx avx2 fma")
    assert not cpu("avx2 avx512f avx512_vnni")
    assert not cpu("avx2 avx_vnni")
    assert not cpu("asimd")  # ARM
    assert not cpu("")


@pytest.mark.vllm
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("capability", "chosen"), [((9, 0), "Cutlass"), ((10, 0), "Triton"), ((12, 0), "Triton"), ((12, 1), "Triton")]
)
def test_the_kernel_on_gpus(
    capability: tuple[int, int], chosen: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own choice on a GPU of this capability, after the plugin has had its say."""
    from vllm import platforms
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class Gpu(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "")
    monkeypatch.setattr(platforms, "_current_platform", Gpu())
    for module in [linear, *(value for value in vars(linear).values() if isinstance(value, type))]:
        place = module if module is linear else sys.modules[module.__module__]
        if hasattr(place, "current_platform"):
            monkeypatch.setattr(place, "current_platform", Gpu())
    int8.decline_cutlass()
    config = Int8ScaledMMLinearLayerConfig(
        is_channelwise=True, is_static_input_scheme=not symmetric, input_symmetric=symmetric
    )
    found = linear.choose_scaled_mm_linear_kernel(config, linear._POSSIBLE_INT8_KERNELS, quantization="int8")
    assert found.__name__ == f"{chosen}Int8ScaledMMLinearKernel"
    disabled = os.environ["VLLM_DISABLED_KERNELS"]
    int8.decline_cutlass()
    assert os.environ["VLLM_DISABLED_KERNELS"] == disabled  # once is enough


def test_the_dtype_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    size = sum(file.stat().st_size for file in tiny_llama.glob("*.safetensors"))

    def chosen(flags: str, total: float, hardware: str = "cpu") -> str:
        monkeypatch.setattr(machine, "cpu_flags", lambda: set(flags.split()))
        monkeypatch.setattr(machine, "memory", lambda: {"total_bytes": int(total), "available_bytes": int(total)})
        return settings.dtype(checkpoint, hardware)

    assert chosen("avx2", 5 * size) == "float32"
    assert chosen("avx2", 3 * size) == "bfloat16"  # float32 would take more than half of the memory
    assert chosen("avx2 avx512f", 5 * size) == "bfloat16"
    assert chosen("asimd", 5 * size) == "bfloat16"
    assert chosen("avx2", 5 * size, "cuda") == "bfloat16"


def test_what_the_processor_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 fma\nbugs\t\t: none\n"
    monkeypatch.setattr(machine, "Path", lambda _: SimpleNamespace(read_text=lambda: text))
    assert machine.cpu_flags() == {"fpu", "avx2", "fma"}


def test_a_process_may_use_amx_tiles() -> None:
    """Asked of Linux itself (arch_prctl, ARCH_GET_XCOMP_PERM), in a process that has not multiplied."""
    code = """
import ctypes
from qtool.environments import machine
from qtool.runtimes.kernels import tiles
def permitted():
    bits = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(bits)) == 0
    return bits.value >> 18 & 1
tiles.allow()
print(permitted() == ("amx_tile" in machine.cpu_flags()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.vllm
@pytest.mark.skipif("avx512f" not in machine.cpu_flags(), reason="such processors have it tested above")
def test_the_same_on_a_processor_with_avx2_alone() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_products_are or test_layers", __file__]
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
