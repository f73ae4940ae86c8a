"""Kernels that vLLM in this process must not take: VLLM_DISABLED_KERNELS."""

from __future__ import annotations

import os

_VARIABLE = "VLLM_DISABLED_KERNELS"


def disabled() -> list[str]:
    """The names of their classes, the user's and qtool's."""
    return [name for name in os.environ.get(_VARIABLE, "").split(",") if name]


def disable(kernel: str) -> None:
    """One more of them."""
    os.environ[_VARIABLE] = ",".join([*disabled(), kernel])
