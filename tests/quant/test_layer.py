"""One decoder layer quantized as a whole: what is folded changes nothing, what is rounded changes little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtool.quant.group import Storage
from qtool.quant.layer import LayerResult, quantize_layer, smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, find_groups, linear_layers
from qtool.quant.weights import ModuleWeights
from qtool.recipe.policy import Policy, SmoothQuant, Static

EXACT = Storage(torch.float32, lambda scale, scheme: scale, lambda scale: scale)
BFLOAT16 = Storage(torch.bfloat16, lambda scale, scheme: scale, lambda scale: scale)
DYNAMIC = Policy(layers=".*")
HEADS = 4  # of every model that make_model makes


def observe(layer: Any, groups: list[Group]) -> dict[str, InputStatistics]:
    statistics = {group.linears[0]: InputStatistics(stride=1, with_hessian=True) for group in groups}
    handles = [
        layer.module.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
        for name, seen in statistics.items()
    ]
    layer.run()
    for handle in handles:
        handle.remove()
    return statistics


def quantize(layer: Any, policy: Policy | dict[str, Policy | None], storage: Storage = EXACT) -> LayerResult:
    groups = find_groups(layer.module, layer.run, HEADS)
    names = linear_layers(layer.module)
    policies = policy if isinstance(policy, dict) else dict.fromkeys(names, policy)
    return quantize_layer(layer.module, groups, policies, observe(layer, groups), storage)


def fake(x: torch.Tensor, scale: float | None, offset: int | None) -> torch.Tensor:
    if scale is None or offset is None:
        steps = 2 * x.abs().amax(dim=-1, keepdim=True) / 255
        return (x / steps).round().clamp(-128, 127) * steps
    return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale


def run_rounded(layer: Any, result: LayerResult) -> torch.Tensor:
    """The layer's output with dequantized weights and fake-quantized inputs."""
    handles = []
    for name, linear in result.linears.items():
        module = layer.module.get_submodule(name)
        module.weight.copy_(linear.weight * linear.weight_scale[:, None])
        if linear.bias is not None:
            assert torch.equal(module.bias, linear.bias)
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, args, linear=linear: (fake(args[0], linear.input_scale, linear.input_zero_point),)
            )
        )
    output = layer.run()
    for handle in handles:
        handle.remove()
    return output


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("storage", [EXACT, BFLOAT16], ids=["float32", "bfloat16"])
def test_folded_weights_compute_the_same(
    architecture: str, storage: Storage, decoder_layer: Callable[[str], Any]
) -> None:
    layer = decoder_layer(architecture)
    before = layer.run()
    result = quantize(layer, DYNAMIC, storage)
    assert any(group.smoothing == "osl" for group in result.groups)
    # gains are rounded to the model's dtype, but then the weights take up what that loses
    torch.testing.assert_close(layer.run(), before, rtol=2e-4, atol=5e-5 * float(before.abs().max()))
    if storage is BFLOAT16:
        for name, weight in layer.module.named_parameters():
            if weight.dim() == 1 and name.endswith("layernorm.weight"):
                assert torch.equal(weight, weight.to(torch.bfloat16).float()), name


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("smoothing", ["osl", "smoothquant", "none"])
def test_rounded_layer_is_close(mode: Any, rounding: Any, smoothing: Any, decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("qwen2")
    before = layer.run()
    policy = Policy.model_validate({"layers": ".*", "activations": mode, "rounding": rounding, "smoothing": smoothing})
    result = quantize(layer, policy)
    assert set(result.linears) == set(linear_layers(layer.module))
    for name, linear in result.linears.items():
        module = layer.module.get_submodule(name)
        assert (linear.weight.dtype, linear.weight.shape) == (torch.int8, module.weight.shape)
        assert (linear.weight_scale.dtype, linear.weight_scale.shape) == (torch.float32, module.weight.shape[:1])
        assert linear.is_static == (mode == "static")
        assert relative(linear.weight * linear.weight_scale[:, None], module.weight) < 0.04
    assert [g.alpha is None for g in result.groups] == [smoothing == "none"] * len(result.groups)
    assert relative(run_rounded(layer, result), before) < (0.03 if mode == "static" else 0.015)


def test_quantized_and_float_linears_side_by_side(decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("llama")
    before = layer.run()
    policies: dict[str, Policy | None] = dict.fromkeys(linear_layers(layer.module), DYNAMIC)
    policies["self_attn.k_proj"] = policies["mlp.down_proj"] = None
    down = layer.module.mlp.down_proj.weight.clone()
    result = quantize(layer, policies)
    assert set(result.linears) == {name for name, policy in policies.items() if policy}
    # k reads the same smoothed input as q and v: it must take up the scale although it stays float
    torch.testing.assert_close(layer.run(), before, rtol=2e-4, atol=5e-5 * float(before.abs().max()))
    assert torch.equal(layer.module.mlp.down_proj.weight, down)
    assert relative(run_rounded(layer, result), before) < 0.015


def test_a_layer_left_float_is_untouched(decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("llama")
    before = {name: p.clone() for name, p in layer.module.state_dict().items()}
    result = quantize(layer, dict.fromkeys(linear_layers(layer.module)))
    assert result == LayerResult()
    assert all(torch.equal(p, before[name]) for name, p in layer.module.state_dict().items())


def test_static_inputs_of_a_group_share_scale_and_offset(decoder_layer: Callable[[str], Any]) -> None:
    result = quantize(decoder_layer("llama"), Policy(layers=".*", activations=Static(mode="static")))
    inputs = {
        name: (linear.input_scale, linear.input_zero_point)
        for name, linear in result.linears.items()
        if name.startswith("self_attn.") and not name.endswith("o_proj")
    }
    assert len(inputs) == 3
    assert len(set(inputs.values())) == 1


def test_smoothquant_uses_the_alpha_it_is_given(decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("llama")
    norm = layer.module.input_layernorm.weight.clone()
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    w_max = torch.cat([layer.module.get_submodule(n).weight for n in names]).abs().amax(dim=0)
    seen: list[torch.Tensor] = []
    handle = layer.module.self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    layer.run()
    handle.remove()
    act_max = seen[0].abs().amax(dim=(0, 1))
    result = quantize(layer, Policy(layers=".*", smoothing=SmoothQuant(method="smoothquant", alpha=0.3)))
    assert {group.alpha for group in result.groups} == {0.3}
    expected = norm / (act_max**0.3 / w_max**0.7)
    torch.testing.assert_close(layer.module.input_layernorm.weight, expected, rtol=1e-4, atol=1e-6)


def test_folding_reads_every_vector_once(decoder_layer: Callable[[str], Any]) -> None:
    class Counted(ModuleWeights):
        def vector(self, name: str) -> torch.Tensor | None:
            read.append(name)
            return super().vector(name)

    read: list[str] = []
    layer = decoder_layer("llama")
    groups = find_groups(layer.module, layer.run, HEADS)
    policies: dict[str, Policy | None] = dict.fromkeys(linear_layers(layer.module), DYNAMIC)
    smooth(Counted(layer.module), groups, policies, observe(layer, groups), torch.float32)
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= set(read)
    assert len(read) == len(set(read))
