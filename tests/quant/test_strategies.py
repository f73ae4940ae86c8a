"""Whole decoder layers at every number of bits and with every way to share a scale, against compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs as TheirArgs
from compressed_tensors.quantization.lifecycle import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qtool.quant.integer import InputQuantizer
from qtool.quant.layer import quantize_layer
from qtool.quant.topology import find_groups, linear_layers
from qtool.quant.types import QuantizedLinear
from qtool.quant.weights import ModuleWeights, Rows, chunks
from qtool.recipe.policy import Policy
from qtool.scheme import FP8_BLOCK, FP8_DYNAMIC, QuantizationArgs
from tests.quant.test_layer import EXACT, HEADS, observe, relative

STRATEGIES: dict[str, dict[str, Any]] = {
    "channel": {"strategy": "channel"},
    "tensor": {"strategy": "tensor"},
    "group": {"strategy": "group", "group_size": 16},
}


def quantized(layer: Any, **policy: Any) -> dict[str, QuantizedLinear]:
    made = Policy.model_validate({"layers": ".*", "smoothing": "none", **policy})
    groups = find_groups(layer.module, layer.run, HEADS)
    policies: dict[str, Policy | None] = dict.fromkeys(linear_layers(layer.module), made)
    return quantize_layer(layer.module, groups, policies, observe(layer, groups), EXACT).linears


def as_they_do(weight: torch.Tensor, num_bits: int, way: dict[str, Any], symmetric: bool = True) -> torch.Tensor:
    """What compressed-tensors makes of a weight without a search."""
    theirs = TheirArgs(num_bits=num_bits, symmetric=symmetric, **way)
    if way["strategy"] == "tensor":
        low, high = weight.amin()[None], weight.amax()[None]
    elif way["strategy"] == "channel":
        low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    else:
        grouped = weight.unflatten(1, (-1, way["group_size"]))
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scale, zero = calculate_qparams(low, high, theirs)
    return fake_quantize(weight, scale, zero, theirs)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rounding_to_nearest_is_theirs(strategy: str, num_bits: int, decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("qwen2")
    weights = {name: module.weight.clone() for name, module in linear_layers(layer.module).items()}
    way = STRATEGIES[strategy]
    made = quantized(layer, weights={"num_bits": num_bits, **way}, clip=False, rounding="nearest")
    assert set(made) == set(weights)
    for name, linear in made.items():
        shape = tuple(weights[name].shape)
        assert (linear.weight.dtype, tuple(linear.weight.shape)) == (torch.int8, shape)
        assert tuple(linear.weight_scale.shape) == linear.scheme.weights.scales_shape(shape)
        low, high = int(linear.weight.min()), int(linear.weight.max())
        assert -(2 ** (num_bits - 1)) <= low < high <= 2 ** (num_bits - 1) - 1
        expected = as_they_do(weights[name], num_bits, way)
        found = linear.dequantize()
        # the largest of a range lies half a step from two integers
        near = (found - expected).abs() <= 1e-5 * expected.abs() + 1e-7
        assert near.float().mean() > 0.95
        step = (expected - weights[name]).abs().max() * 2
        assert float((found - expected).abs().max()) <= float(step) * 1.01
        torch.testing.assert_close(linear.dequantize(3, 7), found[3:7])


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_zero_points_are_theirs(strategy: str, num_bits: int, decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("qwen2")
    weights = {name: module.weight.clone() for name, module in linear_layers(layer.module).items()}
    way = STRATEGIES[strategy]
    plain = {"activations": "float", "clip": False, "rounding": "nearest"}
    made = quantized(layer, weights={"num_bits": num_bits, "symmetric": False, **way}, **plain)
    for name, linear in made.items():
        assert linear.weight_zero_point is not None
        assert linear.weight_zero_point.shape == linear.weight_scale.shape
        expected, found = as_they_do(weights[name], num_bits, way, symmetric=False), linear.dequantize()
        near = (found - expected).abs() <= 1e-5 * expected.abs() + 1e-6
        assert near.float().mean() > 0.95
        torch.testing.assert_close(linear.dequantize(3, 7), found[3:7])


@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_scales_of_few_bits_beside_floats_have_signs(strategy: str, decoder_layer: Callable[[str], Any]) -> None:
    """With that the weights come out nearer; integers beside integers, and of 8 bits, have none."""
    found, seen = [], []
    for num_bits, activations in ((4, "dynamic"), (4, "float"), (8, "float")):
        layer = decoder_layer("llama")
        weights = {name: module.weight.clone() for name, module in linear_layers(layer.module).items()}
        way = {"num_bits": num_bits, **STRATEGIES[strategy]}
        made = quantized(layer, weights=way, activations=activations, rounding="nearest")
        seen.append(any(bool((linear.weight_scale < 0).any()) for linear in made.values()))
        found.append(sum(relative(linear.dequantize(), weights[name]) for name, linear in made.items()))
    assert seen == [False, True, False]
    assert found[1] < found[0]


def test_zero_points_err_less(decoder_layer: Callable[[str], Any]) -> None:
    """Where weights lie on one side of 0 for the most part."""
    found = []
    for symmetric in (True, False):
        layer = decoder_layer("llama")
        with torch.no_grad():
            for module in linear_layers(layer.module).values():
                module.weight.add_(module.weight.std())
        weights = {name: module.weight.clone() for name, module in linear_layers(layer.module).items()}
        way = {"num_bits": 3, "group_size": 16, "symmetric": symmetric}
        made = quantized(layer, weights=way, activations="float", rounding="nearest")
        found.append(sum(relative(linear.dequantize(), weights[name]) for name, linear in made.items()))
    assert found[1] < 0.85 * found[0]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("smoothing", ["none", "osl"])
def test_searches_err_less_on_the_layers_own_output(
    strategy: str, rounding: str, smoothing: str, decoder_layer: Callable[[str], Any]
) -> None:
    def error(**policy: Any) -> float:
        layer = decoder_layer("llama")
        before = layer.run()
        way = {"num_bits": 3, **STRATEGIES[strategy]}
        for name, linear in quantized(layer, weights=way, activations="dynamic", **policy).items():
            layer.module.get_submodule(name).weight.copy_(linear.dequantize())
        return relative(layer.run(), before)

    plain = error(clip=False, rounding="nearest")
    searched = error(clip=True, rounding=rounding, smoothing=smoothing)
    assert searched < plain


def test_groups_of_four_bits_err_less_than_channels(decoder_layer: Callable[[str], Any]) -> None:
    found = {}
    for strategy, way in STRATEGIES.items():
        layer = decoder_layer("llama")
        weights = {name: module.weight.clone() for name, module in linear_layers(layer.module).items()}
        made = quantized(layer, weights={"num_bits": 4, **way}, clip=False, rounding="nearest")
        found[strategy] = sum(relative(linear.dequantize(), weights[name]) for name, linear in made.items())
    assert found["group"] < 0.9 * found["channel"] < found["channel"] <= found["tensor"]


# ------------------------------------------------------------------ floating point

FLOATS: dict[str, dict[str, Any]] = {
    "channel": {"strategy": "channel"},
    "block": {"strategy": "block", "block_structure": [16, 32]},
    "parts of blocks": {"strategy": "block", "block_structure": [48, 24]},
}


def floats_as_they_do(weight: torch.Tensor, way: dict[str, Any]) -> torch.Tensor:
    """What compressed-tensors makes of a weight with scales of whole ranges."""
    theirs = TheirArgs(num_bits=8, type="float", symmetric=True, **way)
    if way["strategy"] == "channel":
        peak = weight.abs().amax(dim=1, keepdim=True)
    else:
        rows, columns = way["block_structure"]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        peak = padded.abs().unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))
    scale, zero = calculate_qparams(-peak, peak, theirs)
    return fake_quantize(weight, scale, zero, theirs)


@pytest.mark.parametrize("way", FLOATS)
def test_floating_point_is_theirs(way: str, decoder_layer: Callable[[str], Any]) -> None:
    layer = decoder_layer("qwen2")
    weights = {name: module.weight.clone() for name, module in linear_layers(layer.module).items()}
    made = quantized(layer, weights={"type": "float", **FLOATS[way]}, rounding="nearest")
    for name, linear in made.items():
        assert linear.weight.dtype == torch.float8_e4m3fn
        assert tuple(linear.weight_scale.shape) == linear.scheme.weights.scales_shape(tuple(weights[name].shape))
        expected, found = floats_as_they_do(weights[name], FLOATS[way]), linear.dequantize()
        near = (found - expected).abs() <= 1e-5 * expected.abs() + 1e-9
        assert near.float().mean() > 0.99  # the rest lies half a step from two numbers
        torch.testing.assert_close(linear.dequantize(3, 41), found[3:41])
        torch.testing.assert_close(linear.dequantize(17), found[17:])


@pytest.mark.parametrize("way", FLOATS)
def test_gptq_errs_less_in_floating_point_too(way: str, decoder_layer: Callable[[str], Any]) -> None:
    found = {}
    for rounding in ("nearest", "gptq"):
        layer = decoder_layer("llama")
        before = layer.run()
        made = quantized(layer, weights={"type": "float", **FLOATS[way]}, activations="float", rounding=rounding)
        for name, linear in made.items():
            layer.module.get_submodule(name).weight.copy_(linear.dequantize())
        found[rounding] = relative(layer.run(), before)
    assert found["gptq"] < 0.9 * found["nearest"] < 0.1


@pytest.mark.parametrize("args", [FP8_DYNAMIC.activations, FP8_BLOCK.activations])
@pytest.mark.parametrize("width", [256, 200])
def test_floating_point_inputs_are_theirs(args: QuantizationArgs, width: int) -> None:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)) * 7
    whole = torch.nn.functional.pad(x, (0, -width % 128))  # they take no part of a group
    theirs = TheirArgs.model_validate(
        {"num_bits": 8, "type": "float", "dynamic": True, "strategy": args.strategy, "group_size": args.group_size}
    )
    if args.group_size:
        peak = whole.unflatten(-1, (-1, 128)).abs().amax(dim=-1)
    else:
        peak = whole.abs().amax(dim=-1, keepdim=True)
    scale, zero = calculate_qparams(-peak, peak, theirs)
    expected = fake_quantize(whole, scale, zero, theirs)[..., :width]
    found = InputQuantizer(args)(x)
    assert ((found - expected).abs() <= 1e-6 * expected.abs()).float().mean() > 0.995
    assert 0.005 < relative(found, x) < 0.05


@pytest.mark.parametrize("elements", [1, 64 * 20, 64 * 33, 10**6])
@pytest.mark.parametrize("together", [1, 16])
def test_rows_that_share_scales_come_together(
    elements: int, together: int, decoder_layer: Callable[[str], Any]
) -> None:
    weights = ModuleWeights(decoder_layer("llama").module)
    names = [f"self_attn.{part}_proj" for part in "qkv"]
    seen: dict[str, list[Rows]] = {}
    for chunk in chunks(weights, names, elements, together):
        assert sum(rows.stop - rows.start for rows in chunk) <= max(together, elements // 64, 1)
        for rows in chunk:
            seen.setdefault(rows.linear, []).append(rows)
    assert list(seen) == names
    for name, parts in seen.items():
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == weights.shape(name)[0]
        assert all(part.start % together == 0 for part in parts)
