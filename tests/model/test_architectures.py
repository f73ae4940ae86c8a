"""What is known of families: found by structure, and changed in one place for an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.model import architectures
from qtool.model.architectures import Architecture
from qtool.model.decoder import DecoderStream
from tests import families


@pytest.fixture(scope="module")
def mixtral(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make(tmp_path_factory.mktemp("models") / "mixtral", "mixtral", tiny_tokenizer)


def test_experts_and_their_router_are_found(mixtral: Path) -> None:
    stream = DecoderStream(Checkpoint.open(mixtral), dtype=torch.float32)
    routed = stream.routed(1)
    assert routed is not None
    assert routed.router == "mlp.gate.weight"
    assert stream.stored(1, routed.router) == "model.layers.1.block_sparse_moe.gate.weight"
    assert [*routed.names[2]] == [f"model.layers.1.block_sparse_moe.experts.2.{part}" for part in ("w1", "w3", "w2")]
    assert stream.experts_per_token == 2


def test_an_exception_is_one_class_and_its_name_in_the_table(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unusual(Architecture):
        model_types: ClassVar[tuple[str, ...]] = ("mixtral",)
        experts_per_token: ClassVar[str] = "num_local_experts"

        def router(self, layer: nn.Module, experts: str, count: int, hidden: int) -> str | None:
            return "input_layernorm.weight"

    monkeypatch.setattr(architectures, "_EXCEPTIONS", (Unusual, *architectures._EXCEPTIONS))
    stream = DecoderStream(Checkpoint.open(mixtral), dtype=torch.float32)
    routed = stream.routed(0)
    assert routed is not None
    assert routed.router == "input_layernorm.weight"
    assert stream.experts_per_token == len(routed.names) == 6
    assert type(architectures.of("qwen3")) is Architecture


def test_experts_of_another_kind_are_refused() -> None:
    class Experts(nn.Module):
        has_bias = True

        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.empty(4, 8, 16, device="meta"))

    layer = nn.Module()
    layer.add_module("experts", Experts())
    with pytest.raises(InputError, match=r"the experts of layers\.3\.experts are of a kind") as caught:
        list(Architecture().experts(layer, "layers.3", "folder"))
    assert caught.value.where == "folder"
