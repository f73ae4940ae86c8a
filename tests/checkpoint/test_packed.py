"""Packed integers, against compressed-tensors' own packing, its decompression and transformers' loader."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
from tests.managed import REPOSITORY

FORM = formats.get("compressed-tensors")
WITHOUT_ZERO_POINTS = ("w8a16", "w4a16-g32", "w4a16-channel", "w4a8-g32", "w4a8-channel", "w8a16-g32")
WITH_ZERO_POINTS = ("w4a16-asymmetric-g32", "w4a16-asymmetric-channel")
SCHEMES = (*WITHOUT_ZERO_POINTS, *WITH_ZERO_POINTS)


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
    zero_point = None
    if not kind.weights.symmetric:
        places = torch.randint(kind.weights.qmin, kind.weights.qmax + 1, groups.shape[:2], generator=generator)
        zero_point = places.to(torch.int8) if kind.weights.group_size else places[:, 0].to(torch.int8)
    scale = symmetric_scale(groups.abs().amax(dim=2), kind.weights)
    scale = FORM.storable_weight_scale(scale, kind, torch.bfloat16)
    numbers = to_grid(groups / scale[..., None], kind.weights).flatten(1)
    if kind.has_signed_scales:
        scale[::2] *= -1
    made = scale if kind.weights.group_size else scale[:, 0]
    return QuantizedLinear(
        kind,
        numbers.to(storage_dtype(kind.weights)),
        made,
        torch.randn(out, generator=generator).bfloat16() if bias else None,
        weight_zero_point=zero_point,
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
    assert (found.weight_zero_point is None) == linear.scheme.weights.symmetric
    if found.weight_zero_point is not None and linear.weight_zero_point is not None:
        assert torch.equal(found.weight_zero_point, linear.weight_zero_point)
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
    zero_points = None
    if not linear.scheme.weights.symmetric:
        shape = torch.Size((len(linear.weight), tensors["q.weight_scale"].shape[1]))
        zero_points = unpack_from_int32(tensors["q.weight_zero_point"], bits, shape, packed_dim=0)
        theirs = pack_to_int32(zero_points, bits, packed_dim=0)
        assert torch.equal(tensors["q.weight_zero_point"], theirs)
    found = their_dequantize(integers, tensors["q.weight_scale"].float(), zero_points)
    torch.testing.assert_close(found, linear.dequantize(), rtol=0, atol=0)
    assert torch.equal(linear.dequantize(3, 7), linear.dequantize()[3:7])
    made = FORM.tensors("q", linear, torch.bfloat16)
    assert sum(tensor.nbytes for tensor in made.values()) <= FORM.nbytes(linear.shape, linear.scheme)


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
    "zero": ("weight_scale", torch.zeros(12, 3), "0 or not finite"),
    "infinite": ("weight_scale", torch.full((12, 3), torch.inf), "0 or not finite"),
    "zero point": ("weight_zero_point", torch.ones(12, dtype=torch.int8), "asymmetric"),
}


def test_negative_scales_where_inputs_are_integers_too(store: Callable[..., Path]) -> None:
    folder = store({"model.layers.0.proj": random_linear("w4a8-g32")})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.proj.weight_scale": -torch.ones(12, 3)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match="not positive and finite"):
        formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.proj")


ZERO_POINT_DAMAGE = {
    "unpacked": torch.zeros(12, 3, dtype=torch.int8),
    "words": torch.zeros(3, 3, dtype=torch.int32),
    "groups": torch.zeros(2, 2, dtype=torch.int32),
}


@pytest.mark.parametrize("damage", ZERO_POINT_DAMAGE)
def test_zero_points_that_do_not_fit(store: Callable[..., Path], damage: str) -> None:
    folder = store({"model.layers.0.proj": random_linear("w4a16-asymmetric-g32")})
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.proj.weight_zero_point": ZERO_POINT_DAMAGE[damage]}, folder / "model.safetensors"
    )
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=r"weight_zero_point is .*, expected torch.int32 \[2, 3\]"):
        formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.proj")


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit(store: Callable[..., Path], damage: str) -> None:
    part, tensor, message = DAMAGE[damage]
    folder = store({"model.layers.0.proj": random_linear("w4a16-g32")})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.layers.0.proj.{part}": tensor}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=message):
        formats.of(checkpoint).read_linear(checkpoint, "model.layers.0.proj")


# ------------------------------------------------------------------ GPTQ and AWQ, made by conversions


def by_the_book(kind: str, tensors: dict[str, torch.Tensor], name: str, bits: int) -> np.ndarray[Any, Any]:
    """The weight [out, in] that AutoGPTQ and AutoAWQ read, field by field."""
    mask, per_word = (1 << bits) - 1, 32 // bits
    words = {part: tensors[f"{name}.{part}"].numpy().astype(np.uint32) for part in ("qweight", "qzeros")}
    scales = tensors[f"{name}.scales"].float().numpy()
    order = [0, 2, 4, 6, 1, 3, 5, 7] if kind == "awq" else range(per_word)  # of output channels in a word

    def along_outputs(packed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found = np.zeros((len(packed), packed.shape[1] * per_word), np.int64)
        for place, channel in enumerate(order):
            found[:, channel::per_word] = (packed >> np.uint32(place * bits)) & mask
        return found

    zeros = along_outputs(words["qzeros"])
    if kind == "awq":
        codes = along_outputs(words["qweight"])
        group = np.arange(len(codes)) // (len(codes) // len(scales))
    else:
        codes, zeros = along_outputs(words["qweight"].T).T, zeros + 1
        group = tensors[f"{name}.g_idx"].numpy()
    weight: np.ndarray[Any, Any] = ((codes - zeros[group]) * scales[group]).T
    return weight


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gptq", "w4a16-g32"),
        ("gptq", "w4a16-channel"),
        ("gptq", "w8a16"),
        ("awq", "w4a16-g32"),
        ("awq", "w4a16-channel"),
        ("awq", "w4a16-asymmetric-g32"),
        ("awq", "w4a16-asymmetric-channel"),
    ],
)
def test_older_layouts_hold_the_same_numbers(
    store: Callable[..., Path], run_qtool: Callable[..., Any], kind: str, name: str, tmp_path: Path
) -> None:
    linear = random_linear(name, out=16, bias=True)
    done = run_qtool("convert", store({"model.layers.0.proj": linear}), "--to", kind, "--output", tmp_path / "made")
    assert done.code == 0, done.stderr
    checkpoint = Checkpoint.open(tmp_path / "made")
    assert formats.of(checkpoint).name == kind
    tensors = {each: checkpoint.tensor(each) for each in checkpoint.names}
    bits, expected = linear.scheme.weights.num_bits, linear.dequantize().numpy()
    np.testing.assert_array_equal(by_the_book(kind, tensors, "model.layers.0.proj", bits), expected)
    assert torch.equal(FloatReader(checkpoint).rows("model.layers.0.proj.weight", 0, 16), linear.dequantize())
    assert linear.bias is not None
    assert torch.equal(tensors["model.layers.0.proj.bias"], linear.bias)
    settings = checkpoint.config["quantization_config"]
    assert (settings["bits"], settings["group_size"]) == (bits, linear.scheme.weights.group_size or -1)
    form = formats.target(kind)
    made = form.tensors("q", dataclasses.replace(linear, bias=None), torch.bfloat16).values()
    assert sum(tensor.nbytes for tensor in made) <= form.nbytes((16, 96), linear.scheme)


@pytest.mark.parametrize(
    ("kind", "names", "says"),
    [
        ("awq", ("w8a16",), "awq can't express W8A16"),
        ("gptq", ("w4a8-g32",), "gptq can't express W4A8"),
        ("gptq", ("w4a16-asymmetric-g32",), "gptq can't express W4A16 with zero points"),
        ("gptq", ("w4a16-g32", "w8a16"), "one scheme for all quantized layers"),
        ("awq", ("odd",), "8 numbers in a word, and 12 x 96 doesn't divide so"),
    ],
)
def test_what_older_layouts_do_not_take(
    store: Callable[..., Path],
    run_qtool: Callable[..., Any],
    kind: str,
    names: tuple[str, ...],
    says: str,
    tmp_path: Path,
) -> None:
    linears = {
        f"model.layers.{i}.{'up' if i else 'down'}_proj": random_linear(
            "w4a16-g32" if name == "odd" else name, out=12 if name == "odd" else 16
        )
        for i, name in enumerate(names)
    }
    done = run_qtool("convert", store(linears), "--to", kind, "--output", tmp_path / "made")
    assert done.code == 2
    assert says in " ".join(done.stderr.split())
    assert not (tmp_path / "made").exists()


def test_they_are_no_formats_to_quantize_to(run_qtool: Callable[..., Any], tiny_llama: Path) -> None:
    assert not {"gptq", "awq"} & set(formats.NAMES)
    assert {"gptq", "awq"} < set(formats.TARGETS)
    done = run_qtool("quantize", tiny_llama, "--format", "gptq")
    assert done.code == 2


# The logits of each checkpoint in a file beside it. vLLM is imported once; each has a fork of its own.
IN_VLLM = """
import json, sys, torch
from tests import loaded_vllm
from tests.zoo.keeper import in_fork
loaded_vllm.load()
from qtool.evaluation.vllm_logits import VllmLogits

def logits(folder):
    config = json.load(open(folder + "/config.json"))
    engine = {"dtype": "bfloat16", "enforce_eager": True}
    torch.save(VllmLogits(folder, config, 48, engine, trust_remote_code=False)(list(range(4, 52))), folder + ".pt")
    return b"done"

for folder in sys.argv[1:]:
    assert in_fork(lambda _: logits(folder), 120) == b"done", folder
"""


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("scheme", "layouts"),
    [("w4a16-g32", ("gptq", "awq")), ("w4a16-asymmetric-g32", ("awq",))],
    ids=lambda each: str(each),
)
def test_vllm_computes_the_same_from_older_layouts(
    make_model: Callable[..., Path],
    run_qtool: Callable[..., Any],
    tmp_path: Path,
    scheme: str,
    layouts: tuple[str, ...],
) -> None:
    """Its kernel for CPUs gets the same integers, scales and zero points, whoever's layout they come in."""
    source = make_model("llama", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    options = ("--scheme", scheme, "--samples", "4", "--seq-len", "64", "--engine", "native")
    assert run_qtool("quantize", source, "--output", tmp_path / "ct", *options).code == 0
    assert run_qtool("convert", tmp_path / "ct", "--to", "bfloat16", "--output", tmp_path / "float").code == 0
    for kind in layouts:
        assert run_qtool("convert", tmp_path / "ct", "--to", kind, "--output", tmp_path / kind).code == 0
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    kinds = ("ct", *layouts, "float")
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM, *(str(tmp_path / kind) for kind in kinds)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others, dequantized = (torch.load(tmp_path / f"{kind}.pt") for kind in kinds)
    assert float(first.std()) > 0.1
    for other in others:
        assert torch.equal(other, first)
    # Negative scales and zero points mean to the kernel what they mean to qtool, up to bfloat16's rounding.
    assert float((first - dequantized).norm() / dequantized.norm()) < 0.1
