"""Llama 4: every expert gets all tokens, zeros where they aren't its own; gate and up are [experts, hidden, both]."""

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
        result: torch.Tensor = up * self.activation(gate)
        return result


class Llama4(Architecture):
    model_types = ("llama4_text",)

    def fused(self, layer: nn.Module, name: str, module: Any, full_name: str, where: str) -> FusedExperts:
        count, intermediate, hidden = module.get_parameter("down_proj").shape
        return FusedExperts(
            name=name,
            gate_up="gate_up_proj",
            down="down_proj",
            count=count,
            hidden=hidden,
            intermediate=intermediate,
            apply_gate=_Gate(module.act_fn),
            router=self.router(layer, name, count, hidden),
            transposed=True,
        )
