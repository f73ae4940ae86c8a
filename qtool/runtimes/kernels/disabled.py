"""Kernels that vLLM in this process must not take: VLLM_DISABLED_KERNELS."""

from __future__ import annotations

import os


def disabled() -> list[str]:
    """The names of their classes, the user's and qtool's."""
    return [name for name in os.environ.get("VLLM_DISABLED_KERNELS", "").split(",") if name]


def disable(kernel: str) -> None:
    """One more of them."""
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join([*disabled(), kernel])
