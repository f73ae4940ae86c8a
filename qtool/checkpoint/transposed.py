"""Layers whose matrix lies in the files as [in, out]: Conv1D of GPT-2 and its kin, linears in all but this.

vLLM 0.32 transposes every `weight` of such a layer as it loads it (models/gpt2.py, `_transpose_conv1d`), so quantized
ones lie in the files in the same way. Everywhere else in qtool they are [out, in], as all others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CONV1D = re.compile(
    r"(^|.*\.)h\.\d+\.(attn\.(c_attn|c_proj)|crossattention\.(c_attn|q_attn|c_proj)|mlp\.(c_fc|c_proj))"
)
_MODEL_TYPES = frozenset(("gpt2", "openai-gpt"))


def has_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a model has such layers, by its config.json."""
    return config.get("model_type") in _MODEL_TYPES


def is_transposed(config: Mapping[str, Any], layer: str) -> bool:
    """Whether this is such a layer, by its name without ".weight"."""
    return has_transposed(config) and _CONV1D.fullmatch(layer) is not None
