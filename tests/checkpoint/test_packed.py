"""Packed integers, against compressed-tensors' own packing, its decompression and transformers' loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs as TheirArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from safetensors.torch import load_file, save_file

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.formats.packing import WIDTHS, pack, unpack, words
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import summarize
from qtool.checkpoint.writer import CheckpointWriter
from qtool.errors import InputError
from qtool.quant.integer import storage_dtype, symmetric_scale, to_grid
from qtool.quant.types import QuantizedLinear
from qtool.scheme import Scheme, named

FORM = formats.get("compressed-tensors")
SCHEMES = ("w8a16", "w4a16-g32", "w4a16-channel", "w4a8-g32", "w4a8-channel", "w8a16-g32")


def scheme(name: str) -> Scheme:
    found = named(name)
    assert found is not None
    return found


def random_linear(name: str, out: int = 12, width: int = 96, bias: bool = False, seed: int = 0) -> QuantizedLinear:
    """Rounded to nearest, with the scales that a bfloat16 model keeps."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * 0.05
    kind = scheme(name)
    groups = weight.unflatten(1, (-1, kind.weights.group_size or width))
    scale = symmetric_scale(groups.abs().amax(dim=2), kind.weights)
    scale = FORM.storable_weight_scale(scale, kind, torch.bfloat16)
    numbers = to_grid(groups / scale[..., None], kind.weights).flatten(1)
    made = scale if kind.weights.group_size else scale[:, 0]
    return QuantizedLinear(
        kind,
        numbers.to(storage_dtype(kind.weights)),
        made,
        torch.randn(out, generator=generator).bfloat16() if bias else None,
    )


@pytest.mark.parametrize("num_bits", WIDTHS)
@pytest.mark.parametrize("width", [1, 7, 32, 37])
def test_words_are_theirs(num_bits: int, width: int) -> None:
    low, high = -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1
    generator = torch.Generator().manual_seed(width)
    integers = torch.randint(low, high + 1, (5, width), generator=generator, dtype=torch.int8)
    packed = pack(integers, num_bits)
    assert torch.equal(packed, pack_to_int32(integers, num_bits))
    assert packed.shape == (5, words(width, num_bits))
    assert torch.equal(unpack(packed, num_bits, width), integers)
    assert torch.equal(unpack_from_int32(packed, num_bits, integers.shape), integers)


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """store({name: linear}) -> the folder of a bfloat16 model that has these."""

    def make(linears: dict[str, QuantizedLinear]) -> Path:
        with CheckpointWriter(tmp_path / "m", FORM) as writer:
            for name, linear in linears.items():
                writer.add_linear(name, linear, torch.bfloat16)
            writer.add("model.norm.weight", torch.ones(20, dtype=torch.bfloat16))
            writer.finish(None, {"dtype": "bfloat16"}, {})
        return tmp_path / "m"

    return make


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_comes_back_as_it_was(store: Callable[..., Path], name: str, bias: bool) -> None:
    linear = random_linear(name, bias=bias)
    checkpoint = Checkpoint.open(store({"model.layers.0.proj": linear}))
    found = formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.proj")
    assert found is not None
    assert found.scheme == linear.scheme
    assert torch.equal(found.weight, linear.weight)
    assert torch.equal(found.weight_scale, linear.weight_scale)
    assert (found.bias is None) == (linear.bias is None)
    reader = FloatReader(checkpoint)
    assert "model.layers.0.proj.weight" in reader.names
    assert reader.shape("model.layers.0.proj.weight") == tuple(linear.weight.shape)
    assert summarize(checkpoint)["parameters"] == linear.weight.numel() + 20 + (12 if bias else 0)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_reads_the_same_numbers(name: str) -> None:
    linear = random_linear(name)
    tensors = FORM.tensors("q", linear, torch.bfloat16)
    bits = linear.scheme.weights.num_bits
    assert tensors["q.weight_scale"].dtype == torch.bfloat16
    assert tensors["q.weight_packed"].nbytes == linear.weight.numel() * bits // 8
    integers = unpack_from_int32(tensors["q.weight_packed"], bits, torch.Size(tensors["q.weight_shape"].tolist()))
    found = their_dequantize(integers, tensors["q.weight_scale"].float())
    torch.testing.assert_close(found, linear.dequantize(), rtol=0, atol=0)


def test_groups_of_config_say_how_each_layer_is_stored() -> None:
    names = {"m.0.a": scheme("w4a16"), "m.0.b": scheme("w8a8-dynamic"), "m.0.c": scheme("w4a8-g32"), "m.0.d": None}
    described = FORM.describe([], names, {}).quantization_config
    assert described is not None
    assert described["format"] == "mixed-precision"
    groups = {group["targets"][0]: group for group in described["config_groups"].values()}
    assert {target: group["format"] for target, group in groups.items()} == {
        "re:.*\\.a$": "pack-quantized",
        "re:.*\\.b$": "int-quantized",
        "re:.*\\.c$": "pack-quantized",
    }
    assert groups["re:.*\\.a$"]["input_activations"] is None
    assert groups["re:.*\\.c$"]["weights"]["group_size"] == 32
    for group in groups.values():
        TheirArgs.model_validate(group["weights"])
    only = FORM.describe([], {"m.0.b": scheme("w8a8-dynamic")}, {}).quantization_config
    assert only is not None
    assert only["format"] == "int-quantized"
    assert "format" not in only["config_groups"]["group_0"]


def test_int4_that_others_kept_in_int8(store: Callable[..., Path]) -> None:
    """llm-compressor stores W4A8 as int8 with a scale per group."""
    linear = random_linear("w4a8-g32")
    folder = store({"model.layers.0.proj": linear})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.proj.weight_packed"], tensors["model.layers.0.proj.weight_shape"]
    save_file(tensors | {"model.layers.0.proj.weight": linear.weight}, file)
    checkpoint = Checkpoint.open(folder)
    found = formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.proj")
    assert found is not None
    assert torch.equal(found.dequantize(), linear.dequantize())


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "shape": ("weight_shape", torch.tensor([12, 700]), "don't fit 4 bits"),
    "three axes": ("weight_shape", torch.tensor([12, 96, 1]), "don't fit 4 bits"),
    "words": ("weight_packed", torch.zeros(12, 11, dtype=torch.int32), "don't fit 4 bits"),
    "type": ("weight_packed", torch.zeros(12, 12, dtype=torch.int64), "don't fit 4 bits"),
    "groups": ("weight_scale", torch.ones(12, 2), r"weight_scale is \[12, 2\], expected \[12, 3\]"),
    "negative": ("weight_scale", -torch.ones(12, 3), "not positive and finite"),
    "zero point": ("weight_zero_point", torch.ones(12, dtype=torch.int8), "asymmetric"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit(store: Callable[..., Path], damage: str) -> None:
    part, tensor, message = DAMAGE[damage]
    folder = store({"model.layers.0.proj": random_linear("w4a16-g32")})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.layers.0.proj.{part}": tensor}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=message):
        formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.proj")
