"""What stays float in a decoder layer, on layers made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qtool.checkpoint.reader import Checkpoint
from qtool.model import selection
from qtool.model.architectures import Architecture
from qtool.model.decoder import DecoderStream
from tests.zoo import models


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 128, 64))
        self.down_proj = nn.Parameter(torch.empty(count, 64, 64))


class TopK(nn.Linear):
    """A router that gives a tuple, as Phi-3.5-MoE's does."""

    def __init__(self, config: Any) -> None:
        super().__init__(64, 64)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Another(nn.Linear):
    """The same product in other words, as Falcon's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


def _layer(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def test_routers_are_found_beside_experts_of_any_name() -> None:
    mlp = _layer(
        experts=Experts(64),
        gate=nn.Linear(64, 64),
        scorer=nn.Linear(64, 64),
        wg=_layer(router=_layer(first=nn.Linear(64, 96))),
        shared=_layer(gate_proj=nn.Linear(64, 96)),
        shared_expert_gate=nn.Linear(64, 1),
    )
    attention = _layer(gate=nn.Linear(64, 96), q_proj=nn.Linear(64, 64))
    found = selection.reasons(_layer(mlp=mlp, self_attn=attention), Architecture())
    assert found == {
        "mlp.gate": selection.ROUTER,
        "mlp.scorer": selection.ROUTER,
        "mlp.wg.router.first": selection.ROUTER,
        "mlp.shared_expert_gate": selection.SMALL,
    }


def test_routers_of_many_experts_stay_float(tmp_path: Path) -> None:
    model = models.make("text", "hunyuan_v1_moe", tmp_path / "model", {"num_experts": 40})
    stream = DecoderStream(Checkpoint.open(model), dtype=torch.float32)
    found = selection.kept_float(stream)
    assert found == {f"model.layers.{index}.mlp.gate.wg": selection.ROUTER for index in range(2)}


def test_what_decays_and_steps_stays_float() -> None:
    delta = _layer(in_proj_qkv=nn.Linear(64, 256), in_proj_ba=nn.Linear(64, 96), out_proj=nn.Linear(128, 64))
    delta.register_parameter("A_log", nn.Parameter(torch.empty(48)))
    mamba = _layer(
        in_proj=nn.Linear(64, 256), x_proj=nn.Linear(128, 72), dt_proj=nn.Linear(40, 128), out_proj=nn.Linear(128, 64)
    )
    mamba.register_parameter("A_log", nn.Parameter(torch.empty(128, 16)))
    found = selection.reasons(_layer(delta=delta, mamba=mamba), Architecture())
    assert found == dict.fromkeys(("delta.in_proj_ba", "mamba.x_proj", "mamba.dt_proj"), selection.RECURRENCE)


def test_a_subclass_is_quantized_if_it_is_a_product() -> None:
    found = selection.reasons(_layer(falcon=Another(64, 64), phi=TopK(None)), Architecture())
    assert found == {"phi": selection.OTHER_CLASS}


def test_an_architecture_says_what_runtimes_keep_float() -> None:
    class Some(Architecture):
        float_linears: ClassVar[dict[str, str]] = {r".*\.weights_proj": "vLLM's indexer has it as a plain matrix"}

    layer = _layer(indexer=_layer(weights_proj=nn.Linear(64, 64), wq=nn.Linear(64, 64)))
    assert [*selection.reasons(layer, Some())] == ["indexer.weights_proj"]
