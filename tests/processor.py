"""What depends on the processor that the tests run on."""

from __future__ import annotations

import platform


def runtime_dtype() -> str:
    """In which runtimes compute small bfloat16 models here."""
    import torch

    return "bfloat16" if torch.cpu._is_avx512_supported() or platform.machine() != "x86_64" else "float32"
