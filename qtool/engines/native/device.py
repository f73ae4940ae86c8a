"""Where to compute, and in which type."""

from __future__ import annotations

import torch

from qtool.errors import InputError


def choose(wanted: str, *, exact: bool) -> str:
    """`auto` takes an accelerator that torch can use.

    osl: exact takes main memory, the only place that it has its integer products for.

    Raises InputError when torch can't use that device, or the job can't.
    """
    if exact:
        if wanted not in ("auto", "cpu"):
            raise InputError(
                f"osl: exact can't use {wanted}", where="--device", hint="use --device cpu, or osl: fast in the recipe"
            )
        return "cpu"
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "npu": hasattr(torch, "npu") and torch.npu.is_available()}
    if wanted == "auto":
        return next(name for name in ("npu", "cuda", "cpu") if usable[name])
    if not usable[wanted]:
        raise InputError(f"torch can't use {wanted} here", where="--device", hint="use --device cpu")
    return wanted


def compute_dtype(device: str, *, exact: bool) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32; osl: exact is float32."""
    if exact:
        return torch.float32
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32
