"""How large vLLM's cache has to be: on CPUs what is asked for is touched, and what isn't is most of the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint import config as claims


def context(config: Mapping[str, Any]) -> int:
    """Tokens that a model takes at most, by its config.json."""
    return claims.context(config) or 4096


def bytes_per_token(config: Mapping[str, Any]) -> int:
    """Key and value of every layer, in float32 at most."""
    return 4 * (claims.kept_per_token(config) or 0)
