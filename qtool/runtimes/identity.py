"""What must stay the same for answers to be continued: the model, and the settings that decide about an answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK = 1 << 16
_SAMPLES = 16  # of _CHUNK bytes, of each file of weights: from its header to its end
_SMALL = (
    "config.json",
    "generation_config.json",
    "quant*_description.json",
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
)

# of vLLM's EngineArgs those that are about memory, time and devices
RESOURCES = frozenset(
    {
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "num_gpu_blocks_override",
        "block_size",
        "swap_space",
        "cpu_offload_gb",
        "kv_offloading_size",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "async_scheduling",
        "enforce_eager",
        "compilation_config",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "enable_expert_parallel",
        "distributed_executor_backend",
    }
)


def decisive(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of `--set` decides about an answer. What is only about memory, time and devices may change while a job is
    continued, after memory ran out for example."""
    return {name: value for name, value in arguments.items() if not name.isupper() and name not in RESOURCES}


def fingerprint(model: Path) -> str:
    """What tells a checkpoint folder from others, without reading all of it: a hash of the small files that decide
    about an answer, of the weights' names and sizes, and of samples of the weights."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in _SMALL for file in model.glob(pattern) if file.is_file()}):
        found.update(repr(file.name).encode() + file.read_bytes())
    for file in sorted(file for file in model.glob("*.safetensors") if file.is_file()):
        size = file.stat().st_size
        found.update(repr((file.name, size)).encode())
        with file.open("rb", buffering=0) as weights:
            for i in range(_SAMPLES):
                found.update(os.pread(weights.fileno(), _CHUNK, max(0, size - _CHUNK) * i // (_SAMPLES - 1)))
    return found.hexdigest()
