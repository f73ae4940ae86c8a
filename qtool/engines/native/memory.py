"""Memory: what was used, and what a job will need."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qtool.engines.native.stream import DecoderStream

_BASE_BYTES = 520 * 10**6  # this process with torch, transformers and a tokenizer loaded (measured 0.51 GB)


def peak() -> int:
    """Peak resident set of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def estimate(stream: DecoderStream, samples: int, seq_len: int, *, exact: bool) -> dict[str, Any]:
    """Time and peak memory of quantizing, from the sizes of the model and a short timing of this machine.

    Work per layer: one forward pass over the calibration tokens, the Gram matrices of its inputs (about as much
    again), and the search over weights. Memory: hidden states, one layer as bfloat16 and float32 with copies. Exact
    OSL searches on all tokens, not on a sample of them, and keeps what every linear takes and gives.
    """
    tokens = samples * seq_len
    parameters = [sum(p.numel() for p in stream.skeleton_layer(i).parameters()) for i in range(stream.depth)]
    widths = [max(p.shape[-1] for p in stream.skeleton_layer(i).parameters()) for i in range(stream.depth)]
    hidden = stream.hidden_size
    rate = _flops(stream.dtype, stream.device)
    forward = sum(2 * count * tokens for count in parameters)
    gram = sum(2 * tokens * (width**2 + 3 * hidden**2) for width in widths)
    search = sum(2 * 20 * (tokens if exact else 512) * count for count in parameters)
    item = torch.finfo(stream.dtype).bits // 8
    working = max(count * (item + 4 * 3) + 4 * 4 * width**2 for count, width in zip(parameters, widths, strict=True))
    if exact:
        layer = stream.skeleton_layer(0)
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        working += 2 * 4 * tokens * sum(linear.in_features + linear.out_features for linear in linears)
    return {
        "estimated_seconds": round(8 + (forward + gram + search) / rate * 1.5, 1),
        "estimated_peak_bytes": _BASE_BYTES + tokens * hidden * item + working,
    }


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    a = torch.randn(512, 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    a @ b
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 0.2:
        float((a @ b)[0, 0])
        count += 1
    return count * 2 * 512 * 1024 * 1024 / (time.perf_counter() - begin)
