"""How large vLLM's cache has to be: on CPUs what is asked for is touched, and what isn't is most of the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def context(config: Mapping[str, Any]) -> int:
    """Tokens that a model takes at most, by its config.json."""
    return int(_text(config).get("max_position_embeddings") or 4096)


def bytes_per_token(config: Mapping[str, Any]) -> int:
    """Key and value of every layer, in float32 at most."""
    text = _text(config)
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    return int(8 * text["num_hidden_layers"] * (text.get("num_key_value_heads") or heads) * width)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the text model, where there are others beside it."""
    return config.get("text_config") or config
