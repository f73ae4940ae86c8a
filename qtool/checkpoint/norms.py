"""Biases of norms that the model itself has none of.

msmodelslim writes them into a DeepSeek, and MindFormers adds them to what the projections after the norm read ("beta").
Other runtimes have no place for them.
"""

from __future__ import annotations

import re

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError

_BIAS = re.compile(r"\.layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.(q|kv)_a_layernorm)\.bias$")


def idle_biases(checkpoint: Checkpoint, reader: str) -> list[str]:
    """The biases of a DeepSeek-V3's norms, all zeros, which `reader` may pass over.

    Raises:
        InputError: one isn't zero, so that a reader without it would compute something else.
    """
    if checkpoint.config.get("model_type") != "deepseek_v3":
        return []
    found = [name for name in checkpoint.names if _BIAS.search(name)]
    for name in found:
        if bool(checkpoint.tensor(name).any()):
            raise InputError(
                f"{name} is not zero, and {reader} has no bias of norms",
                where=str(checkpoint.path),
                hint="vllm-ascend and MindFormers run it as it is.",
            )
    return found
