"""The loops that run float layers: what they see is what transformers' own model has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError
from qtool.model.decoder import DecoderStream
from qtool.model.observe import forward, observe, sample_stride
from qtool.model.state import Batch
from qtool.quant.statistics import InputStatistics
from tests import families


class Steps:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def progress(self, step: str, done: int, total: int, unit: str) -> None:
        self.seen.append((step, done, total))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(4, 500, (5, 20), generator=torch.Generator().manual_seed(0))


def whole(folder: Path, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(what enters each layer and leaves the last one; what enters the second one's down_proj), by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states: list[torch.Tensor] = []
    inner: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _m, args: states.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda _m, _a, out: states.append(out))
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _m, args: inner.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    return states, inner[0]


@torch.no_grad()
def test_states_and_statistics_are_those_of_transformers(tiny_llama: Path, ids: torch.Tensor) -> None:
    states, inner = whole(tiny_llama, ids)
    stream, steps = DecoderStream(Checkpoint.open(tiny_llama), dtype=torch.float32), Steps()
    found = [batch.hidden.clone() for batch in forward(stream, ids, 40, "forward", steps)]  # type: ignore[arg-type]
    for hidden, expected in zip(found, states, strict=True):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert steps.seen == [("forward", 0, 2), ("forward", 1, 2), ("forward", 2, 2)]

    seen = InputStatistics(stride=sample_stride(ids.numel()), with_hessian=False)
    with stream.layer(1) as layer:
        outputs = list(observe(stream, 1, layer, Batch(ids, (found[1],)).split(2), {"mlp.down_proj": seen}))
        assert not any(module._forward_pre_hooks for module in layer.modules())
    assert [len(output.ids) for output in outputs] == [2, 2, 1]
    torch.testing.assert_close(Batch.cat(outputs).hidden, found[2])
    flat = inner.flatten(0, 1)
    for value, expected in ((seen.low, flat.amin(0)), (seen.high, flat.amax(0))):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(flat.abs().max()))


@torch.no_grad()
def test_a_handler_takes_the_place_of_the_experts_meanwhile(
    tiny_tokenizer: Any, tmp_path: Path, ids: torch.Tensor
) -> None:
    model = families.make(tmp_path / "model", "mixtral", tiny_tokenizer, dtype=torch.float32)
    stream = DecoderStream(Checkpoint.open(model), dtype=torch.float32)
    hidden, routed = stream.prologue(ids), stream.routed(0)
    assert routed is not None
    called: list[int] = []

    def nothing(x: torch.Tensor, _chosen: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        called.append(len(x))
        return torch.zeros_like(x)

    with stream.layer(0) as layer:
        without = Batch.cat(list(observe(stream, 0, layer, hidden.split(3), experts=nothing))).hidden
        first = next(observe(stream, 0, layer, hidden.split(3), experts=nothing))  # abandoned half way
        usual = Batch.cat(list(observe(stream, 0, layer, hidden.split(3)))).hidden
    assert called == [60, 40, 60]
    torch.testing.assert_close(first.hidden, without[:3])
    assert float((usual - without).abs().max()) > 0.1


@torch.no_grad()
def test_hidden_states_that_are_not_finite(tiny_llama: Path, ids: torch.Tensor) -> None:
    stream = DecoderStream(Checkpoint.open(tiny_llama), dtype=torch.float32)
    steps = forward(stream, ids, 40, "forward", Steps())  # type: ignore[arg-type]
    next(steps).hidden[0, 0, 0] = torch.inf
    with pytest.raises(QtoolError, match=r"after model\.layers\.0 are not finite"):
        next(steps)
