"""Experts that qtool wrote one by one, put together again as transformers' own files have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

_DOWN = re.compile(r"down_proj|output_linear|fc2|w2")
_BIAS = re.compile(r"_bias$|\.bias$")


@dataclass
class Together:
    """Fused tensors that are missing from a result.

    Attributes:
        tensors: made of the experts' own.
        plain: the original ones, rounded to nearest by output channel.
        used: names of the experts' tensors that went in.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def together(missing: Mapping[str, torch.Tensor], apart: Mapping[str, torch.Tensor], *, interleaved: bool) -> Together:
    """Fused tensors [experts, ...] of the separate experts' tensors, whose names are EXPERTS.NUMBER.PROJECTION.KIND.

    Args:
        missing: the original ones.
        apart: float, of the result.
        interleaved: rows of gate and up take turns.
    """
    found = Together()
    for name, original in missing.items():
        match = re.match(r"(.*\.experts)\.", name)
        stem = match[1] if match else f"{name.removesuffix('.weight').rpartition('.')[0]}.experts"
        kind = "bias" if _BIAS.search(name) else "weight"
        parts = ("down_proj",) if _DOWN.search(name) else ("gate_proj", "up_proj")
        if (alone := re.search(r"\.(gate_proj|up_proj)\.weight$", name)) is not None:
            parts = (alone[1],)  # Step 3.7's file
        experts = []
        for number in range(original.shape[0]):
            names = [full for part in parts if (full := f"{stem}.{number}.{part}.{kind}") in apart]
            if not names:
                break
            found.used.update(names)
            rows = [apart[each].float() for each in names]
            experts.append(torch.stack(rows, dim=1).flatten(0, 1) if interleaved and len(rows) > 1 else torch.cat(rows))
        if len(experts) < original.shape[0]:
            continue
        fused = torch.stack(experts)
        transposed = fused.shape != original.shape
        found.tensors[name] = fused.transpose(1, 2).contiguous() if transposed else fused
        if kind == "weight":
            found.plain[name] = _nearest(original.float(), dim=1 if transposed else 2)
    return found


def _nearest(weight: torch.Tensor, dim: int) -> torch.Tensor:
    scale = 2 * weight.abs().amax(dim=dim, keepdim=True).clamp(min=1e-8) / 255
    return (weight / scale).round().clamp(-128, 127) * scale
