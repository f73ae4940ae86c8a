"""Targets of compressed-tensors name the text layers of a model with towers, whatever a runtime calls them."""

from __future__ import annotations

import re

import pytest

from qtool.checkpoint.formats.targets import is_plain, targets
from qtool.scheme import W8A8_DYNAMIC, Scheme


@pytest.mark.parametrize(
    ("text", "tower"),
    [
        ("language_model.model.layers", "vision_tower.vision_model.encoder.layers"),  # Gemma 3
        ("model.layers", "visual.blocks"),  # Qwen2.5-VL
        ("model.language_model.layers", "model.audio_tower.layers"),
    ],
)
def test_layers_are_named_for_every_runtime(text: str, tower: str) -> None:
    parts = ("self_attn.q_proj", "mlp.up_proj")
    schemes: dict[str, Scheme | None] = {f"{text}.{i}.{part}": W8A8_DYNAMIC for i in range(12) for part in parts}
    schemes |= {f"{tower}.{i}.{part}": None for i in range(12) for part in parts}
    found = targets(schemes, W8A8_DYNAMIC)
    assert len(found) == 2
    patterns = [re.compile(each.removeprefix("re:")) for each in found]

    def are_named(heads: list[str]) -> set[bool]:
        names = (f"{head}.{i}.{part}" for head in heads for i in range(12) for part in parts)
        return {any(pattern.match(name) for pattern in patterns) for name in names}

    assert are_named([text, "model.language_model.layers", "language_model.model.layers"]) == {True}
    assert are_named([tower, f"model.{tower}"]) == {False}
    assert not any(pattern.match(f"{text}.12.mlp.up_proj") for pattern in patterns)


def test_a_model_without_towers_is_named_as_before() -> None:
    schemes: dict[str, Scheme | None] = {f"model.layers.{i}.mlp.up_proj": W8A8_DYNAMIC if i else None for i in range(3)}
    assert targets(schemes, W8A8_DYNAMIC) == [r"re:model\.layers\.(1|2)\.mlp\.up_proj$"]


_AROUND: dict[str, Scheme | None] = {"model.embed_tokens": None, "lm_head": None}


@pytest.mark.parametrize(
    ("beside", "plain"),
    [
        ({}, True),
        ({"model.layers.0.mlp.gate": None}, False),  # a router
        ({"model.layers.0.mlp.experts.0.up_proj": W8A8_DYNAMIC}, False),
        ({"model.layers.1.self_attn.q_proj": None}, False),
        ({"lm_head": W8A8_DYNAMIC}, False),  # is no Linear to runtimes
        ({"visual.blocks.0.attn.qkv": None}, False),
        ({"multi_modal_projector.linear_1": None}, False),  # runtimes may have another name for it
    ],
)
def test_what_the_class_alone_can_name(beside: dict[str, Scheme | None], plain: bool) -> None:
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    schemes: dict[str, Scheme | None] = {f"model.layers.0.{part}": W8A8_DYNAMIC for part in parts}
    assert is_plain(schemes | _AROUND | beside) == plain


@pytest.mark.parametrize(
    ("model_type", "linear", "in_vllm"),
    [
        ("stablelm", "mlp.gate_proj", "mlp.gate_up_proj"),
        ("stablelm", "self_attn.q_proj", "self_attn.qkv_proj"),
        ("gptj", "attn.k_proj", "attn.qkv_proj"),
        ("lfm2", "conv.in_proj", "short_conv.in_proj"),
        ("aria", "mlp.shared_experts.down_proj", "down_proj"),
        ("jamba", "self_attn.o_proj", "o_proj"),
        ("granitemoehybrid", "mamba.in_proj", "mixer.in_proj"),
        ("falcon_h1", "mamba.in_proj", "mixer.in_proj"),
        ("gpt_oss", "self_attn.o_proj", "attn.o_proj"),
        ("llama", "mlp.gate_proj", None),
    ],
)
def test_what_vllm_calls_a_layer_is_named_too(model_type: str, linear: str, in_vllm: str | None) -> None:
    schemes: dict[str, Scheme | None] = {f"model.layers.{i}.{linear}": W8A8_DYNAMIC for i in range(2)}
    (target,) = targets(schemes, W8A8_DYNAMIC, model_type)
    pattern = re.compile(target.removeprefix("re:"))
    assert pattern.match(f"model.layers.1.{linear}")
    if in_vllm is None:
        assert target == r"re:.*\.mlp\.gate_proj$"
    else:
        assert pattern.match(f"model.layers.1.{in_vllm}")


def test_a_layer_without_a_name_in_vllm_is_found_by_its_class() -> None:
    linears = ("self_attn.q_a_proj", "mlp.up_proj")
    schemes: dict[str, Scheme | None] = {f"model.layers.0.{linear}": W8A8_DYNAMIC for linear in linears}
    assert targets(schemes | _AROUND, W8A8_DYNAMIC, "minicpm3")[-1] == "Linear"
    assert "Linear" not in targets(schemes | _AROUND, W8A8_DYNAMIC, "qwen3")
    assert "Linear" not in targets({**schemes, "model.layers.0.mlp.up_proj": None}, W8A8_DYNAMIC, "minicpm3")


@pytest.mark.parametrize("linear", ["mlp.gate_up_proj", "mlp.experts.3.gate_proj"])
def test_a_tower_with_linears_of_such_names_is_left_out(linear: str) -> None:
    """As GLM-4V has them, dense and with experts: runtimes call the lists of layers otherwise, and fuse the tower's."""
    tower: dict[str, Scheme | None] = {f"model.visual.blocks.0.mlp.{part}_proj": None for part in ("gate", "up")}
    text: dict[str, Scheme | None] = {f"model.language_model.layers.{i}.{linear}": W8A8_DYNAMIC for i in range(2)}
    (target,) = targets(tower | text, W8A8_DYNAMIC)
    pattern = re.compile(target.removeprefix("re:"))
    assert pattern.match(f"language_model.model.layers.1.{linear}")
    assert not pattern.match("visual.blocks.0.mlp.gate_up_proj")
    parts = [linear, "mlp.gate_proj", "mlp.up_proj"] if "gate_up" in linear else [linear]
    for ignored in targets(tower | text, None):
        for part in parts:
            assert not re.match(ignored.removeprefix("re:"), f"language_model.model.layers.1.{part}")
