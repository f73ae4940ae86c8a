"""Runs a modelslim checkpoint as vllm-ascend 0.23 would, but on this CPU: python vllm_ascend_on_cpu.py MODEL IDS OUTPUT

vLLM is the real one, and so is everything of vllm-ascend's that reads the checkpoint: its description file, which
layer is of which type, the parameters that the loader fills, what is made of them, and what the kernels get. Only what
needs Ascend is replaced: three kernels, computed here by their documentation in float64, and modules that a linear
layer on one card never uses. IDS are token ids as JSON; OUTPUT becomes their logits [len(IDS) - 1, vocabulary], by
torch.save.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

UNUSED = (
    "torch_npu",
    "vllm_ascend.ascend_config",
    "vllm_ascend.ascend_forward_context",
    "vllm_ascend.attention",
    "vllm_ascend.distributed",
    "vllm_ascend.flash_common3_context",
    "vllm_ascend.ops",
)

sys.path.insert(0, str(Path(__file__).parent))
from replacing import Replacer  # type: ignore[import-not-found]  # noqa: E402

sys.meta_path.insert(0, Replacer(UNUSED))
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from qtool.workers import hide_media_packages  # noqa: E402

hide_media_packages()

from qtool.runtimes.kernels import tiles  # noqa: E402

tiles.allow()  # no plugin does it here

import torch  # noqa: E402
import torch_npu  # type: ignore[import-not-found]  # noqa: E402
import vllm.model_executor.layers.fused_moe as fused_moe  # noqa: E402
import vllm_ascend.ascend_config  # type: ignore[import-not-found]  # noqa: E402
import vllm_ascend.attention.attention_v1  # type: ignore[import-not-found]  # noqa: E402
import vllm_ascend.distributed.parallel_state  # type: ignore[import-not-found]  # noqa: E402
import vllm_ascend.ops.fused_moe.fused_moe  # type: ignore[import-not-found]  # noqa: E402
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl  # noqa: E402

vllm_ascend.distributed.parallel_state.get_mc2_group = object  # no group of cards
vllm_ascend.ops.fused_moe.fused_moe.AscendUnquantizedFusedMoEMethod = fused_moe.UnquantizedFusedMoEMethod

import vllm_ascend.ops.linear  # type: ignore[import-not-found]  # noqa: E402
import vllm_ascend.quantization.compressed_tensors_config  # type: ignore[import-not-found]  # noqa: E402 (registers it)
import vllm_ascend.quantization.method_adapters as adapters  # type: ignore[import-not-found]  # noqa: E402
import vllm_ascend.quantization.modelslim_config  # type: ignore[import-not-found]  # noqa: E402 (registers it)
import vllm_ascend.utils  # type: ignore[import-not-found]  # noqa: E402


def npu_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """int8 x [n, in] times int8 weight [in, out]: an int32 bias is added to the integers, a float one to the result."""
    assert x.dtype == weight.dtype == torch.int8
    result = x.double() @ weight.double()
    if bias is not None and bias.dtype == torch.int32:
        result += bias
    result *= scale.double()
    if pertoken_scale is not None:
        result *= pertoken_scale.double()[..., None]
    if bias is not None and bias.dtype != torch.int32:
        result += bias.double()
    return result.to(output_dtype)


def npu_dynamic_quant(x: torch.Tensor, dst_type: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, a scale per token."""
    assert dst_type == torch.int8
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / 127
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def quantize(x: torch.Tensor, scale: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return (x.float() * reciprocal.float() + offset.float()).round().clamp(-128, 127).to(torch.int8)


torch_npu.npu_quant_matmul = npu_quant_matmul
torch_npu.npu_dynamic_quant = npu_dynamic_quant
library = torch.library.Library("vllm", "FRAGMENT")
library.define("quantize(Tensor x, Tensor scale, Tensor reciprocal, Tensor offset) -> Tensor")
library.impl("quantize", quantize, "CPU")

# What it computes attention with is Ascend's; what it loads of an int8 cache is its own patch of vLLM's models.
vllm_ascend.attention.attention_v1.AscendC8AttentionBackendImpl = CPUAttentionBackendImpl
runpy.run_path(str(Path(vllm_ascend.utils.__file__).parent / "patch/worker/patch_gqa_c8.py"))

# One card, no special layout of weights, nothing fetched ahead, experts that stay where they are.
vllm_ascend.ascend_config.get_ascend_config().eplb_config.dynamic_eplb = False
for switch in ("oproj_tp_enable", "mlp_tp_enable", "flashcomm2_enable", "enable_dsa_cp_with_layer_shard"):
    setattr(adapters, switch, lambda: False)
vllm_ascend.utils._should_trans_nz = lambda weight: False
vllm_ascend.utils._WEIGHT_PREFETCH_METHOD = MagicMock()
vllm_ascend.ops.linear.AscendUnquantizedLinearMethod = UnquantizedLinearMethod
type(current_platform).supported_quantization = ["ascend", "compressed-tensors"]


def main(model: str, ids: list[int], output: str) -> None:
    from qtool.evaluation.vllm_logits import VllmLogits

    with open(f"{model}/config.json") as file:
        config = json.load(file)
    engine = {"quantization": "ascend", "dtype": "bfloat16", "enforce_eager": True}
    torch.save(VllmLogits(model, config, len(ids), engine, trust_remote_code=False)(ids), output)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
