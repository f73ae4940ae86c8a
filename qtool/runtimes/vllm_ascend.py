"""vLLM on Ascend through PyTorch: the plugin vllm-ascend (0.23)."""

from __future__ import annotations

from qtool.runtimes.description import Limit, Limitation, Quantized, Reads, Runtime
from qtool.runtimes.vllm import RUNTIME as VLLM
from qtool.scheme import W8A8_DYNAMIC

# The rows were run with 0.23.0, of which there is a wheel; the files named here are the same in 0.23.0.post1, which is
# source only.

# Model types whose experts the plugin finds in a description file.
EXPERTS = frozenset(
    {
        "bailing_hybrid",
        "deepseek_mtp",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm4v_moe_text",
        "glm_moe_dsa",
        "kimi_k2",
        "longcat_flash",
        "minimax_m2",
        "pangu_ultra_moe",
        "pangu_ultra_moe_mtp",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_vl_moe",
        "step3p5",
        "step3p5_mtp",
    }
)


def _static_in_float32(model: Quantized) -> Limitation | None:
    if model.dtype != "F32" or not model.static:
        return None
    return Limitation(
        "a float32 model with static activations: vllm-ascend has them for bfloat16 and float16 only",
        fatal=True,
        hint="Take the model in bfloat16, or another format.",
    )


def _experts(model: Quantized) -> Limitation | None:
    model_type = model.config.get("model_type")
    routed = [name for name, scheme in model.schemes.items() if scheme is not None and ".experts." in name]
    if not routed or model_type in EXPERTS:
        return None
    return Limitation(
        f"{len(routed)} linears of routed experts are quantized, which vllm-ascend doesn't load for {model_type}",
        unread=True,
        hint="Convert to compressed-tensors, for vLLM.",
    )


def _other_names(model: Quantized) -> Limitation | None:
    if model.architecture != _RENAMED:
        return None
    return Limitation(
        f"vllm-ascend doesn't load {_RENAMED} in modelslim format: it asks for the layers by other names",
        unread=True,
        hint="vLLM reads it: quantize the original with --scheme w8a8-dynamic --format compressed-tensors.",
    )


def _whole_channels(model: Quantized) -> Limitation | None:
    found = [
        name
        for name, scheme in model.schemes.items()
        if scheme is not None
        and (scheme.weights.num_bits, scheme.weights.strategy) == (4, "channel")
        and ".experts." not in name
    ]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears have int4 weights with one scale per output channel, which vllm-ascend reads of routed "
        "experts alone",
        fatal=True,
        hint="Use groups: --scheme w4a8-g128, say.",
    )


def _other_schemes(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme not in (None, W8A8_DYNAMIC)]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears are not W8A8 with symmetric activations per token, which vllm-ascend wants here",
        unread=True,
        hint="Take --scheme w8a8-dynamic, or --format modelslim.",
    )


def _unloaded_cache(model: Quantized) -> Limitation | None:
    if model.cache != "int8" or model.architecture in _CACHED:
        return None
    return Limitation(
        f"vllm-ascend loads the scales of int8 keys and values for {', '.join(_CACHED)} alone",
        unread=True,
        hint="Quantize the original without --kv-cache.",
    )


_CACHED = ("Glm4MoeForCausalLM", "MiniMaxM2ForCausalLM", "Qwen3ForCausalLM")
_RENAMED = "TeleChat2ForCausalLM"

RUNTIME = Runtime(
    name="vllm-ascend",
    title="vllm-ascend",
    version="0.23.0.post1",
    summary="vLLM on Ascend, through PyTorch",
    reads=(
        Reads("float"),
        Reads(
            "modelslim",
            {"quantization": "ascend"},
            (
                Limit(
                    "deq_scale is registered for bfloat16 and float16 alone",
                    "vllm-ascend 0.23.0.post1: quantization/methods/w8a8_static.py",
                    _static_in_float32,
                ),
                Limit(
                    "KeyError: packed_modules_model_mapping names no experts of this model type",
                    "vllm-ascend 0.23.0.post1: quantization/modelslim_config.py (get_linear_quant_type)",
                    _experts,
                ),
                Limit(
                    "KeyError: the description has the layers' own names, and the model asks for vLLM's",
                    "vllm-ascend 0.23.0.post1: quantization/modelslim_config.py (get_linear_quant_type); "
                    "vllm: telechat2.py",
                    _other_names,
                ),
                Limit(
                    "ZeroDivisionError: a linear of 4 bits has groups",
                    "vllm-ascend 0.23.0.post1: quantization/methods/w4a8.py (get_pergroup_param)",
                    _whole_channels,
                ),
                Limit(
                    "the scales of keys and values are loaded for GLM-4.5 MoE, MiniMax-M2 and Qwen3 alone",
                    "vllm-ascend 0.23.0.post1: patch/worker/patch_gqa_c8.py, quantization/methods/kv_c8.py",
                    _unloaded_cache,
                ),
            ),
            "vllm-ascend 0.23.0.post1: quantization/modelslim_config.py, "
            "quantization/methods/{w8a8_static,w8a8_dynamic,w4a8}.py",
            frozenset(
                {
                    "DeepseekV3ForCausalLM",
                    "Glm4MoeForCausalLM",
                    "LlamaForCausalLM",
                    "MistralForCausalLM",
                    "Qwen2ForCausalLM",
                    "Qwen3ForCausalLM",
                    "Qwen3MoeForCausalLM",
                }
            ),
            frozenset({"int8"}),
        ),
        # With experts it was not seen to load: the vLLM that it ran on here calls them by another class.
        Reads(
            "compressed-tensors",
            {},
            (
                Limit(
                    "NotImplementedError: No compressed-tensors compatible quantization type was found",
                    "vllm-ascend 0.23.0.post1: quantization/compressed_tensors_config.py (_detect_quant_type), "
                    "quantization/methods/w4a8.py",
                    _other_schemes,
                ),
            ),
            "vllm-ascend 0.23.0.post1: quantization/compressed_tensors_config.py, quantization/methods/w8a8_dynamic.py",
            frozenset(
                {
                    "LlamaForCausalLM",
                    "MistralForCausalLM",
                    "Qwen2ForCausalLM",
                    "Qwen3ForCausalLM",
                    "TeleChat2ForCausalLM",
                }
            ),
        ),
    ),
    hardware=("ascend",),
    plugin_of=VLLM.name,
    worker=VLLM.worker,
    server=VLLM.server,
    servers=VLLM.servers,
)
