"""The groups found by probing, against what each architecture's code says; and folding, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qtool.quant.topology import Group, find_groups, fold, linear_layers, per_producer_channel, signature

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 4, 2, 32, 64, 160

Expected = dict[tuple[str, ...], tuple[str, list[int]] | None]
IDENTITY = list(range(HIDDEN))
UP = list(range(INTERMEDIATE))
# query head h reads key-value head h // 2
VALUES = [h // (HEADS // KV_HEADS) * HEAD_DIM + d for h in range(HEADS) for d in range(HEAD_DIM)]


def attention(norm: str | None) -> Expected:
    return {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (norm, IDENTITY) if norm else None,
        ("self_attn.o_proj",): ("self_attn.v_proj", VALUES),
    }


def mlp(norm: str | None) -> Expected:
    return {
        ("mlp.gate_proj", "mlp.up_proj"): (norm, IDENTITY) if norm else None,
        ("mlp.down_proj",): ("mlp.up_proj", UP),
    }


USUAL = attention("input_layernorm") | mlp("post_attention_layernorm")
GEMMA = attention("input_layernorm") | mlp("pre_feedforward_layernorm")
EXPECTED: dict[str, Expected] = {
    "llama": USUAL,
    "qwen2": USUAL,
    "qwen3": USUAL,
    "mistral": USUAL,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    # norms come after attention and MLP: their inputs are the residual stream itself
    "olmo2": attention(None) | mlp(None),
    "phi3": {
        ("self_attn.qkv_proj",): ("input_layernorm", IDENTITY),
        # the last rows of a fused projection: values after queries and keys, up after gate
        ("self_attn.o_proj",): ("self_attn.qkv_proj", [(HEADS + KV_HEADS) * HEAD_DIM + v for v in VALUES]),
        ("mlp.gate_up_proj",): ("post_attention_layernorm", IDENTITY),
        ("mlp.down_proj",): ("mlp.gate_up_proj", [INTERMEDIATE + i for i in UP]),
    },
}


def found(groups: list[Group]) -> Expected:
    return {g.linears: (g.fold.producer, g.fold.channel_map.tolist()) if g.fold else None for g in groups}


@pytest.mark.parametrize("architecture", list(EXPECTED))
def test_groups(architecture: str, decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer(architecture)
    before = {name: p.clone() for name, p in layer.module.state_dict().items()}
    groups = find_groups(layer.module, layer.run)
    assert found(groups) == EXPECTED[architecture]
    for name, p in layer.module.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_groups_of_a_parallel_block(decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("phi")
    groups = {frozenset(g.linears): g.fold for g in find_groups(layer.module, layer.run)}
    shared = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"})
    assert set(groups) == {shared, frozenset({"self_attn.dense"}), frozenset({"mlp.fc2"})}
    norm, values = groups[shared], groups[frozenset({"self_attn.dense"})]
    assert norm is not None
    assert (norm.producer, norm.channel_map.tolist()) == ("input_layernorm", IDENTITY)
    assert values is not None
    assert values.producer == "self_attn.v_proj"
    assert groups[frozenset({"mlp.fc2"})] is None  # a nonlinearity stands between


def test_groups_of_a_parallel_block_with_two_norms(decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("gpt_neox")
    groups = find_groups(layer.module, layer.run)
    assert {name for g in groups for name in g.linears} == set(linear_layers(layer.module))
    producers = {g.linears: g.fold and g.fold.producer for g in groups}
    assert producers["attention.query_key_value",] == "input_layernorm"
    assert producers["mlp.dense_h_to_4h",] == "post_attention_layernorm"
    assert producers["mlp.dense_4h_to_h",] is None  # a nonlinearity stands between


@pytest.mark.parametrize("architecture", [*EXPECTED, "phi", "gpt_neox"])
def test_folding_does_not_change_the_output(architecture: str, decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer(architecture)
    groups = find_groups(layer.module, layer.run)
    before, weights = layer.run(), {n: p.clone() for n, p in layer.module.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    folded = 0
    for group in groups:
        if group.fold is None:
            continue
        channels = (torch.randn(int(group.fold.channel_map.max()) + 1, generator=generator) * 0.7).exp()
        fold(layer.module, group, channels[group.fold.channel_map])
        folded += 1
    assert folded >= 2
    assert any(not torch.equal(p, weights[n]) for n, p in layer.module.state_dict().items())
    after = layer.run()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=2e-5 * float(before.abs().max()))


class TwoReaders(nn.Module):
    """A norm whose output a linear reads, and the residual as well: nothing can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 8)
        self.gain = nn.Linear(8, 6, bias=False)
        self.second = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = y + self.first(y)
        return y + self.second(self.gain(y.tanh()))


def test_a_producer_with_another_reader_is_left_alone() -> None:
    torch.manual_seed(0)
    layer = TwoReaders().requires_grad_(False)
    x = torch.randn(1, 8, 8)
    groups = {g.linears: g.fold for g in find_groups(layer, lambda: layer(x))}
    assert groups["first",] is None
    assert groups["gain",] is None
    target = groups["second",]
    assert target is not None
    assert (target.producer, target.channel_map.tolist()) == ("gain", list(range(6)))


def test_per_producer_channel(decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("llama")
    target = next(g.fold for g in find_groups(layer.module, layer.run) if g.linears == ("self_attn.o_proj",))
    assert target is not None
    values = torch.randn(HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    by_head = values.view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    expected = by_head.amax(dim=1, keepdim=True).expand_as(by_head).reshape(-1)
    assert torch.equal(per_producer_channel(target, values), expected)


def test_signature_tells_structures_apart(decoder_layer: Callable[[str], Any]) -> None:
    llama, qwen2 = decoder_layer("llama").module, decoder_layer("qwen2").module
    assert signature(llama) == signature(decoder_layer("mistral").module)
    assert signature(llama) != signature(qwen2)
