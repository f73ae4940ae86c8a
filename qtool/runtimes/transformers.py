"""The reference: transformers' own model code in one plain decoding loop."""

from __future__ import annotations

from qtool.runtimes.description import Reads, Runtime

RUNTIME = Runtime(
    name="transformers",
    title="transformers",
    version="5.19.0",
    summary="the reference: transformers' own models, one plain decoding loop",
    reads=(
        Reads("float"),
        Reads("compressed-tensors", ran={"LlamaForCausalLM": ("w8a8",), "Qwen2ForCausalLM": ("w8a8",)}),
    ),
    others=True,
    hardware=("cpu",),
    worker="qtool.runtimes.worker.transformers",
    sampling=frozenset(
        {
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "seed",
            "stop_token_ids",
            "ignore_eos",
        }
    ),
    vllm=False,
)
