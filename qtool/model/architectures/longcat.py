"""LongCat-Flash: routers choose among experts and identities, which give what they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.model.architectures.architecture import Architecture, FusedExperts


@dataclass(frozen=True)
class _Gate:
    activation: Any

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: torch.Tensor = self.activation(gate) * up
        return result


class LongCat(Architecture):
    model_types = ("longcat_flash",)
    experts_per_token = "moe_topk"

    def fused(self, layer: nn.Module, name: str, module: Any, full_name: str, where: str) -> FusedExperts:
        count, hidden, intermediate = module.get_parameter("down_proj").shape
        return FusedExperts(
            name=name,
            gate_up="gate_up_proj",
            down="down_proj",
            count=count,
            hidden=hidden,
            intermediate=intermediate,
            apply_gate=_Gate(module.act_fn),
            router=None,
            has_identities=True,
        )
