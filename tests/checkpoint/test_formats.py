"""The formats: exact round trips, and the numbers each runtime would compute, worked out here with numpy and torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool import runtimes
from qtool.checkpoint import formats, ranges
from qtool.checkpoint.companions import companions
from qtool.checkpoint.formats.targets import targets
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import CheckpointWriter, Sharding
from qtool.errors import InputError, QtoolError
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W8A8, W8A8_DYNAMIC, QuantizationArgs, Scheme, named
from tests.fake_quantized import FakeQuantized

Layers = dict[str, QuantizedLinear]


def linear(checkpoint: Checkpoint, name: str) -> QuantizedLinear | None:
    return formats.of(checkpoint).read_linear(checkpoint, name)


def assert_same(a: QuantizedLinear | None, b: QuantizedLinear) -> None:
    assert a is not None
    assert torch.equal(a.weight, b.weight)
    assert a.weight.dtype == torch.int8
    assert torch.equal(a.weight_scale, b.weight_scale)
    assert a.weight_scale.dtype == torch.float32
    assert (a.input_scale, a.input_zero_point) == (b.input_scale, b.input_zero_point)
    assert (a.bias is None) == (b.bias is None)
    if a.bias is not None and b.bias is not None:
        assert torch.equal(a.bias, b.bias)


@pytest.fixture
def stored(tmp_path: Path, random_layer: Callable[..., QuantizedLinear]) -> Callable[..., tuple[Checkpoint, Layers]]:
    """stored(format, dtype) -> a checkpoint of layers static and dynamic, with bias and without, and these."""

    def make(name: str, dtype: torch.dtype, **settings: Any) -> tuple[Checkpoint, Layers]:
        form = formats.get(name)
        layers = {}
        with CheckpointWriter(tmp_path / "m", form) as writer:
            for i, (static, bias) in enumerate([(True, False), (True, True), (False, False), (False, True)]):
                layer = random_layer(static=static, bias=bias, seed=i, **settings)
                scale = form.storable_scale(layer.input_scale, dtype) if layer.input_scale else None
                layers[f"model.layers.{i}.proj"] = QuantizedLinear(
                    layer.scheme,
                    layer.weight,
                    layer.weight_scale,
                    None if layer.bias is None else layer.bias.to(dtype),
                    scale,
                    layer.input_zero_point,
                )
                writer.add_linear(f"model.layers.{i}.proj", layers[f"model.layers.{i}.proj"], dtype)
            writer.add("model.norm.weight", torch.ones(20, dtype=dtype))
            writer.add("lm_head.weight", torch.ones(30, 20, dtype=dtype))
            writer.finish(None, {"dtype": str(dtype).removeprefix("torch.")}, {})
        return Checkpoint.open(tmp_path / "m"), layers

    return make


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip(stored: Callable[..., tuple[Checkpoint, Layers]], name: str, dtype: torch.dtype) -> None:
    checkpoint, layers = stored(name, dtype)
    assert formats.of(checkpoint).name == name
    for layer, expected in layers.items():
        assert_same(linear(checkpoint, layer), expected)
    assert linear(checkpoint, "lm_head") is None
    assert linear(checkpoint, "model.norm") is None
    with pytest.raises(InputError, match="no tensor"):
        linear(checkpoint, "model.layers.9.proj")


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize("mode", ["static", "dynamic", "mixed"])
def test_round_trip_of_a_whole_model(
    tmp_path: Path, make_model: Callable[..., Path], quantize_folder: Callable[..., Layers], name: str, mode: str
) -> None:
    source = make_model("qwen2", tie_word_embeddings=True, num_hidden_layers=2)  # its q, k and v have biases
    made = quantize_folder(source, tmp_path / "m", name, mode)
    checkpoint, original = Checkpoint.open(tmp_path / "m"), Checkpoint.open(source)
    assert len(made) == 14
    for layer, expected in made.items():
        assert_same(linear(checkpoint, layer), expected)
    for tensor in original.names:
        owner = tensor.rpartition(".")[0]
        if owner not in made:
            assert torch.equal(checkpoint.tensor(tensor), original.tensor(tensor))
            assert linear(checkpoint, owner) is None
    assert "lm_head.weight" not in checkpoint  # tied to the embedding, as in the source
    assert checkpoint.config["tie_word_embeddings"] is True


# ------------------------------------------------------------------ golden-stick

# mindspore-gs 1.4.1's own output for a float32 model: name -> (dtype, axes); input_scale has the model's dtype.
GOLDEN_STICK_STATIC = {
    "weight": ("int8", "out in"),
    "weight_scale": ("float32", "out"),
    "weight_offset": ("int32", "out"),
    "input_scale": ("model", "in"),
    "input_offset": ("int8", "in"),
    "deq_scale": ("float32", "out"),
    "quant_bias": ("int32", "out"),
}
GOLDEN_STICK_DYNAMIC = {part: GOLDEN_STICK_STATIC[part] for part in ("weight", "weight_scale", "weight_offset")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("static", [True, False])
def test_golden_stick_tensors(random_layer: Callable[..., QuantizedLinear], dtype: torch.dtype, static: bool) -> None:
    layer = random_layer(12, 20, static=static, bias=True)
    tensors = formats.get("golden-stick").tensors("q", layer, dtype)
    expected = dict(GOLDEN_STICK_STATIC if static else GOLDEN_STICK_DYNAMIC) | {"bias": ("model", "out")}
    sizes = {"out": 12, "in": 20}
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == {
        f"q.{part}": (
            str(dtype if kind == "model" else getattr(torch, kind)),
            tuple(sizes[axis] for axis in axes.split()),
        )
        for part, (kind, axes) in expected.items()
    }


def to_numpy(tensors: dict[str, torch.Tensor], name: str) -> dict[str, np.ndarray]:
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return {
        key: (value.float() if value.is_floating_point() else value).numpy().astype(np.float64)
        if value.is_floating_point()
        else value.numpy().astype(np.int64)
        for key, value in own.items()
    }


def fake_quantized(layer: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """What QuantizedLinear promises of a static layer, in float64."""
    assert layer.input_scale is not None
    assert layer.input_zero_point is not None
    q = np.clip(np.round(x / layer.input_scale) + layer.input_zero_point, -128, 127)
    weight = layer.weight.numpy().astype(np.float64) * layer.weight_scale.numpy().astype(np.float64)[:, None]
    y = ((q - layer.input_zero_point) * layer.input_scale) @ weight.T
    return y if layer.bias is None else y + layer.bias.double().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_golden_stick_runtime_formula(
    random_layer: Callable[..., QuantizedLinear], dtype: torch.dtype, bias: bool
) -> None:
    form = formats.get("golden-stick")
    given = random_layer(48, 64, bias=bias)
    assert given.input_scale is not None
    layer = dataclasses.replace(given, input_scale=form.storable_scale(given.input_scale, dtype))
    t = to_numpy(form.tensors("q", layer, dtype), "q")
    x = np.random.default_rng(0).normal(0, 1.5, (33, 64))
    q = np.clip(np.round(x / t["input_scale"]) + t["input_offset"], -128, 127).astype(np.int64)
    y = (q @ t["weight"].T + t["quant_bias"]) * t["deq_scale"]
    y = y + t["bias"] if bias else y
    np.testing.assert_allclose(y, fake_quantized(layer, x), rtol=1e-6, atol=1e-6)
    assert np.abs(q).max() == 128  # the clip was exercised


def vllm_mindspore_objections(description: dict[str, str], linears: list[str]) -> list[str]:
    """The rules by which vllm_mindspore 0.5.1 (model_executor/layers/quantization/golden_stick/golden_stick.py) takes a
    description file, for its native models: within a layer, and within q/k/v and gate/up, one type only; a fused layer
    takes the type of the first key that contains its name once q_proj/gate_proj are read as qkv_proj/gate_up_proj;
    that type must be W8A8 or FLOAT."""
    objections = []
    fused_as = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
        ("gate_proj", "up_proj"), "gate_up_proj"
    )
    kinds: dict[str, set[str]] = {}
    for key, kind in description.items():
        *parents, _ = key.split(".")
        for owner in {".".join(parents), ".".join(fused_as.get(part, part) for part in parents)}:
            kinds.setdefault(owner, set()).add(kind)
    objections += [f"{owner}: {sorted(found)}" for owner, found in kinds.items() if len(found) > 1]
    for linear in linears:
        *parents, last = linear.split(".")
        at_run_time = ".".join([*parents, fused_as.get(last, last)])
        matching = (
            kind
            for key, kind in description.items()
            if at_run_time in key.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
        )
        found = next(matching, "FLOAT")
        if found not in ("W8A8", "FLOAT"):
            objections.append(f"{linear}: {found} is not supported")
        if found != description.get(f"{linear}.weight", "FLOAT"):
            objections.append(f"{linear}: would be taken for {found}")
    return objections


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_golden_stick_satisfies_vllm_mindspore(
    tmp_path: Path, make_model: Callable[..., Path], quantize_folder: Callable[..., Layers], model_type: str
) -> None:
    source = make_model(model_type, num_hidden_layers=12)  # so that layers.1 is also a prefix of layers.10
    made = quantize_folder(source, tmp_path / "m", "golden-stick", "static", sharding=Sharding(300_000))
    files = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    assert files == [f"quant-model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    description = json.loads((tmp_path / "m" / "quantization_description.json").read_text())
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in files for name, tensor in load_file(tmp_path / "m" / file).items()}
    assert set(description) == set(index) == set(tensors)
    assert vllm_mindspore_objections(description, [*made, "lm_head"]) == []
    # The parameters that its W8A8 linear (a8w8.py there) declares, per layer: name, dtype, shape.
    for name, layer in made.items():
        out_size, in_size = layer.weight.shape
        for part, (dtype, shape) in {
            "weight": (torch.int8, (out_size, in_size)),
            "deq_scale": (torch.float32, (out_size,)),
            "quant_bias": (torch.int32, (out_size,)),
            "input_scale": (torch.bfloat16, (in_size,)),
            "input_offset": (torch.int8, (in_size,)),
        }.items():
            assert (tensors[f"{name}.{part}"].dtype, tensors[f"{name}.{part}"].shape) == (dtype, shape)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_deepseek_alone_says_in_config_json_that_it_is_quantized(
    tmp_path: Path, tiny_llama: Path, quantize_folder: Callable[..., Layers], run_qtool: Callable[..., Any]
) -> None:
    """MindFormers' DeepSeek asks for it there; and nobody takes it for another format by that."""
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["DeepseekV3ForCausalLM"]}))
    made = quantize_folder(source, tmp_path / "m", "golden-stick", "mixed")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["quantization_config"] == {"quant_method": "golden-stick"}
    checkpoint = Checkpoint.open(tmp_path / "m")
    form = formats.of(checkpoint)
    assert form.name == "golden-stick"
    assert {name: form.scheme(checkpoint, name) for name in made} == {n: layer.scheme for n, layer in made.items()}
    inspected = json.loads(run_qtool("inspect", tmp_path / "m", "--json").stdout)
    assert inspected["format"] == "golden-stick"
    for target, method in (("modelslim", None), ("compressed-tensors", "compressed-tensors"), ("bfloat16", None)):
        done = run_qtool("convert", tmp_path / "m", "--to", target, "--output", tmp_path / target)
        assert done.code == 0, done.stderr
        other = json.loads((tmp_path / target / "config.json").read_text())
        assert (other.get("quantization_config") or {}).get("quant_method") == method


def test_the_rules_object_to_what_problems_warns_of(
    tmp_path: Path, tiny_llama: Path, quantize_folder: Callable[..., Layers]
) -> None:
    made = quantize_folder(tiny_llama, tmp_path / "m", "golden-stick", "mixed")
    description = json.loads((tmp_path / "m" / "quantization_description.json").read_text())
    assert any("W8A8_DYNAMIC" in objection for objection in vllm_mindspore_objections(description, list(made)))
    schemes = {name: layer.scheme for name, layer in made.items()}
    (problem,) = runtimes.problems("golden-stick", {"architectures": ["Qwen3ForCausalLM"]}, schemes)
    assert problem.fatal
    assert "6 layers" in problem.text
    assert "MindFormers" in problem.text


@pytest.mark.parametrize("name", formats.NAMES)
def test_fused_layers_must_agree(name: str) -> None:
    attention = "model.layers.0.self_attn"
    problems = formats.get(name).problems(
        {f"{attention}.q_proj": W8A8, f"{attention}.k_proj": W8A8, f"{attention}.v_proj": None}
    )
    assert ["q_proj W8A8 static, k_proj W8A8 static, v_proj float" in problem.text for problem in problems] == [True]
    assert not formats.get(name).problems({f"{attention}.q_proj": W8A8, f"{attention}.o_proj": None})


# ------------------------------------------------------------------ modelslim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_modelslim_runtime_formula(
    random_layer: Callable[..., QuantizedLinear], dtype: torch.dtype, bias: bool
) -> None:
    """vllm-ascend: y = (q·Wᵀ + quant_bias) · deq_scale, without the layer's own bias."""
    form = formats.get("modelslim")
    given = random_layer(48, 64, bias=bias)
    assert given.input_scale is not None
    layer = dataclasses.replace(given, input_scale=form.storable_scale(given.input_scale, dtype))
    tensors = form.tensors("q", layer, dtype)
    shapes = {name.removeprefix("q."): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["input_scale"] == shapes["input_offset"] == (1,)
    assert shapes["weight_scale"] == shapes["weight_offset"] == (48, 1)
    assert tensors["q.deq_scale"].dtype == (torch.float32 if dtype == torch.bfloat16 else torch.int64)
    t = to_numpy(tensors, "q")
    deq_scale = t["deq_scale"]
    if dtype == torch.float16:  # the kernel reads the low 32 bits as a float
        deq_scale = t["deq_scale"].astype(np.int32).view(np.float32).astype(np.float64)
    x = np.random.default_rng(0).normal(0, 1.5, (33, 64))
    q = np.clip(np.round(x / t["input_scale"]) + t["input_offset"], -128, 127)
    y = (q @ t["weight"].T.astype(np.float64) + t["quant_bias"]) * deq_scale
    # the bias is rounded to multiples of deq_scale
    np.testing.assert_allclose(y, fake_quantized(layer, x), rtol=1e-6, atol=1e-6 + 0.5 * bias * deq_scale.max())


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_that_the_models_dtype_rounds_is_read_back(
    tmp_path: Path, random_layer: Callable[..., QuantizedLinear], name: str, dtype: torch.dtype
) -> None:
    """Smoothing divides biases in float32. Rounded, they move by more than quant_bias' own step."""
    form = formats.get(name)
    given = random_layer(48, 64)
    bias = torch.linspace(-7, 7, 48) / 3
    scale = form.storable_scale(0.0123456, dtype)
    with CheckpointWriter(tmp_path / "m", form) as writer:
        layer = dataclasses.replace(given, bias=bias, input_scale=scale)
        writer.add_linear("model.layers.0.proj", layer, dtype)
        writer.finish(None, {"dtype": str(dtype).removeprefix("torch.")}, {})
    assert float((bias.to(dtype).float() - bias).abs().max()) > 2 * scale * float(given.weight_scale.min())
    found = linear(Checkpoint.open(tmp_path / "m"), "model.layers.0.proj")
    assert_same(found, dataclasses.replace(layer, bias=bias.to(dtype)))


def test_modelslim_description(tmp_path: Path, make_model: Callable[..., Path], quantize_folder: Any) -> None:
    source = make_model("qwen2", tie_word_embeddings=True)
    made = quantize_folder(source, tmp_path / "m", "modelslim", "mixed")
    description = json.loads((tmp_path / "m" / "quant_model_description.json").read_text())
    assert description["model_quant_type"] == "W8A8"
    assert description["version"] == "1.0.0"
    for name, layer in made.items():
        assert description[f"{name}.weight"] == ("W8A8" if layer.is_static else "W8A8_DYNAMIC")
    assert description["model.layers.0.self_attn.q_proj.bias"] == "FLOAT"
    assert description["model.embed_tokens.weight"] == "FLOAT"
    assert description["lm_head.weight"] == "FLOAT"  # asked for by vllm-ascend though it is tied


def test_a_checkpoint_by_msmodelslim_itself_has_no_weight_scale(
    make_folder: Callable[..., Path], random_layer: Callable[..., QuantizedLinear]
) -> None:
    from safetensors.torch import save

    layer = random_layer()
    for dtype in (torch.bfloat16, torch.float16):
        tensors = formats.get("modelslim").tensors("q", layer, dtype)
        for part in ("weight_scale", "weight_offset"):
            del tensors[f"q.{part}"]
        files = {"quant_model_weights.safetensors": save(tensors), "quant_model_description.json": {"q.weight": "W8A8"}}
        read = linear(Checkpoint.open(make_folder(files, name=str(dtype))), "q")
        assert read is not None
        torch.testing.assert_close(read.weight_scale, layer.weight_scale)


# ------------------------------------------------------------------ compressed-tensors


def test_targets_are_few_and_exact() -> None:
    schemes: dict[str, Scheme | None] = {}
    for i in range(11):
        for last in ("q_proj", "k_proj", "v_proj", "o_proj"):
            schemes[f"model.layers.{i}.self_attn.{last}"] = W8A8
        schemes[f"model.layers.{i}.mlp.up_proj"] = W8A8_DYNAMIC
        schemes[f"model.layers.{i}.mlp.down_proj"] = None if i == 3 else W8A8_DYNAMIC
        schemes[f"model.layers.{i}.cross.self_attn.q_proj"] = W8A8_DYNAMIC
    for i in range(4, 11):  # experts, float in the last layer
        for e in range(3):
            for last, its in (("w1", W8A8_DYNAMIC), ("w2", W8A8), ("w3", W8A8_DYNAMIC)):
                schemes[f"model.layers.{i}.experts.{e}.{last}"] = None if i == 10 else its
    schemes["lm_head"] = None
    import re

    for scheme in (W8A8, W8A8_DYNAMIC, None):
        found = targets(schemes, scheme)
        matched = {
            name
            for name in schemes
            for target in found
            if (re.match(target[3:], name) if target.startswith("re:") else target == name)
        }
        assert matched == {name for name, its in schemes.items() if its == scheme}
        assert len(found) <= 16
    assert "re:.*\\.mlp\\.up_proj$" in targets(schemes, W8A8_DYNAMIC)
    assert r"re:model\.layers\.(4|5|6|7|8|9)\.experts\.[0-9]+\.w1$" in targets(schemes, W8A8_DYNAMIC)
    assert "model.layers.3.mlp.down_proj" in targets(schemes, None)
    assert "re:.*\\.self_attn\\.q_proj$" not in targets(schemes, W8A8)  # it would match the cross layers too
    assert "re:.*\\.self_attn\\.k_proj$" in targets(schemes, W8A8)


def test_a_scale_is_stored_without_loss(random_layer: Callable[..., QuantizedLinear]) -> None:
    form = formats.get("compressed-tensors")
    layer = random_layer()
    tensors = form.tensors("q", layer, torch.bfloat16)
    assert tensors["q.weight_scale"].dtype == torch.float32
    assert tensors["q.input_zero_point"].tolist() == [-37]
    assert tensors["q.input_zero_point"].dtype == torch.int8
    narrow = dataclasses.replace(
        layer,
        weight_scale=form.storable_weight_scale(layer.weight_scale, W8A8, torch.bfloat16),
        input_scale=form.storable_scale(0.0123456, torch.bfloat16),
    )
    tensors = form.tensors("q", narrow, torch.bfloat16)
    assert tensors["q.weight_scale"].dtype == tensors["q.input_scale"].dtype == torch.bfloat16
    assert tensors["q.weight_scale"].shape == (12, 1)
    assert tensors["q.input_scale"].shape == (1,)


def test_storable_scales_stay_put_and_above_zero() -> None:
    for name in formats.NAMES:
        form = formats.get(name)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for value in (1e-30, 3e-7, 0.0123456, 1.0, 77.7):
                stored = form.storable_scale(value, dtype)
                assert stored > 0
                assert form.storable_scale(stored, dtype) == stored
            assert form.storable_scale(0.0123456, dtype) == pytest.approx(0.0123456, rel=2**-8)
            scales = torch.rand(50) * 1e-3 + 1e-6
            narrow = form.storable_weight_scale(scales, W8A8_DYNAMIC, dtype)
            torch.testing.assert_close(narrow, scales, rtol=2**-8, atol=0)


def test_compressed_tensors_own_reader_takes_the_config(
    tmp_path: Path, tiny_llama: Path, quantize_folder: Callable[..., Layers]
) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    quantize_folder(tiny_llama, tmp_path / "m", "compressed-tensors", "mixed")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    static, dynamic = parsed.config_groups.values()
    assert static.input_activations.strategy == "tensor"
    assert not static.input_activations.symmetric
    assert dynamic.input_activations.dynamic is True
    assert len(static.targets) == 4
    assert len(dynamic.targets) == 3
    assert set(parsed.ignore) == {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize(("model_type", "mode"), [("llama", "mixed"), ("qwen2", "static"), ("llama", "dynamic")])
def test_transformers_computes_what_was_written(
    tmp_path: Path, make_model: Callable[..., Path], quantize_folder: Callable[..., Layers], model_type: str, mode: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "float32"
    AutoModelForCausalLM.from_pretrained(make_model(model_type), dtype=torch.float32).save_pretrained(source)
    made = quantize_folder(source, tmp_path / "m", "compressed-tensors", mode)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    reference = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        plain = reference(ids).logits
        for name, layer in made.items():
            reference.set_submodule(name, FakeQuantized(layer))
        expected, actual = reference(ids).logits, loaded(ids).logits
    noise = (expected - plain).norm()
    assert noise > 0.001 * plain.norm()  # quantization does show
    # A value near the middle between two integers may round either way: a few of them move the logits a little.
    assert (actual - expected).norm() < 0.05 * noise


# ------------------------------------------------------------------ what can't be read or written


def damaged(**changes: Any) -> dict[str, torch.Tensor]:
    tensors = {
        "q.weight": torch.ones(3, 4, dtype=torch.int8),
        "q.weight_scale": torch.ones(3),
        "q.weight_offset": torch.zeros(3, dtype=torch.int32),
        "q.input_scale": torch.ones(4),
        "q.input_offset": torch.zeros(4, dtype=torch.int8),
    }
    tensors |= {f"q.{name}": value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({}, "W8A16", "quantized, but not W8A8"),
        ({}, ["W8A8"], "quantized, but not W8A8"),
        ({"weight": torch.ones(3, 4)}, "W8A8", "expected int8"),
        ({"weight": torch.ones(3, 4, 1, dtype=torch.int8)}, "W8A8", "expected int8"),
        ({"weight_scale": torch.ones(5)}, "W8A8", "5 numbers, expected 3"),
        ({"weight_scale": torch.tensor([1.0, 0.0, 1.0])}, "W8A8", "not positive and finite"),
        ({"weight_scale": torch.tensor([1.0, float("nan"), 1.0])}, "W8A8_DYNAMIC", "not positive and finite"),
        ({"weight_scale": None}, "W8A8_DYNAMIC", "no tensor 'q.weight_scale'"),
        ({"weight_offset": torch.ones(3, dtype=torch.int32)}, "W8A8", "asymmetric weights"),
        ({"input_scale": torch.tensor([1.0, 1.0, 1.0, 2.0])}, "W8A8", "differs per channel"),
        ({"input_scale": torch.full((4,), float("inf"))}, "W8A8", "expected a positive number"),
        ({"input_scale": None}, "W8A8", "no tensor 'q.input_scale'"),
        ({"input_offset": torch.full((4,), 200.0)}, "W8A8", "expected an integer"),
        ({"input_offset": torch.full((4,), 0.5)}, "W8A8", "expected an integer"),
    ],
)
def test_layers_that_do_not_fit_together(
    make_folder: Callable[..., Path], changes: dict[str, Any], kind: Any, message: str
) -> None:
    from safetensors.torch import save

    files = {"quant.safetensors": save(damaged(**changes)), "quantization_description.json": {"q.weight": kind}}
    checkpoint = Checkpoint.open(make_folder(files))
    with pytest.raises(InputError, match=message):
        linear(checkpoint, "q")


def scheme(**changes: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group | changes}}
    return {"quantization_config": quantization}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (scheme(weights={"num_bits": 3, "type": "int", "strategy": "channel"}), "in none of the ways"),
        (scheme(weights={"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": True}), "in none of the ways"),
        (scheme(weights={"num_bits": 8, "type": "float", "strategy": "channel"}), "in none of the ways"),
        (scheme(weights={"num_bits": 8, "type": "int", "strategy": "group"}), "in none of the ways"),
        (
            scheme(weights={"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
            "in none of the ways",
        ),
        (
            scheme(input_activations={"num_bits": 4, "strategy": "token", "dynamic": True, "symmetric": False}),
            "in none of the ways",
        ),
        (scheme(targets=["re:("]), "can't be understood"),
        (scheme(targets=[7]), "can't be understood"),
        (scheme(targets=None), "can't be understood"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}, "can't be understood"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized with hqq"),
        ({"quantization_config": {"bits": 4}}, "quantized with unknown"),
        ({"quantization_config": "compressed-tensors"}, "must be an object"),
    ],
)
def test_schemes_that_are_not_read(make_folder: Callable[..., Path], config: dict[str, Any], message: str) -> None:
    from safetensors.torch import save

    files = {"config.json": config, "model.safetensors": save(damaged())}
    folder = make_folder(files)
    with pytest.raises(InputError, match=message):
        linear(Checkpoint.open(folder), "q")


def test_a_checkpoint_by_llm_compressor(make_folder: Callable[..., Path]) -> None:
    """Targets by class, bfloat16 scales of [out, 1], a per-tensor weight scale, no zero point."""
    from safetensors.torch import save

    tensors = {
        "a.weight": torch.ones(3, 4, dtype=torch.int8),
        "a.weight_scale": torch.tensor([0.5], dtype=torch.bfloat16),
        "norm.weight": torch.ones(4, dtype=torch.bfloat16),
        "lm_head.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    }
    config = scheme()
    config["quantization_config"]["ignore"] = ["lm_head"]
    checkpoint = Checkpoint.open(make_folder({"config.json": config, "model.safetensors": save(tensors)}))
    assert_same(linear(checkpoint, "a"), QuantizedLinear(W8A8_DYNAMIC, tensors["a.weight"], torch.full((3,), 0.5)))
    assert linear(checkpoint, "norm") is None
    assert linear(checkpoint, "lm_head") is None


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize(
    "change", [{"weight_scale": torch.tensor([1.0, float("nan")])}, {"input_scale": 0.0}, {"input_zero_point": 128}]
)
def test_layers_that_are_not_written(name: str, change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "scheme": W8A8,
        "weight": torch.ones(2, 3, dtype=torch.int8),
        "weight_scale": torch.ones(2),
        "bias": None,
        "input_scale": 0.1,
        "input_zero_point": 0,
    }
    with pytest.raises(QtoolError):
        formats.get(name).tensors("q", QuantizedLinear(**(fields | change)), torch.bfloat16)


def test_unknown_format() -> None:
    with pytest.raises(InputError, match="unknown format 'gptq'") as caught:
        formats.get("gptq")
    assert "golden-stick" in str(caught.value.hint)


# ------------------------------------------------------------------ what a format says of itself


INT3 = Scheme(QuantizationArgs(num_bits=3, strategy="group", group_size=32), None)


@pytest.mark.parametrize("name", formats.NAMES)
def test_a_scheme_that_a_format_has_no_tensors_for_is_refused(name: str) -> None:
    form = formats.get(name)
    assert all(form.expresses(scheme) for scheme in (W8A8, W8A8_DYNAMIC))
    assert not form.expresses(INT3)
    (problem,) = form.problems({"a": W8A8, "b": INT3, "c": INT3, "d": None})
    assert problem.text == f"{name} can't express W3A16 in groups of 32, which 2 layers would be (b, ...)"
    assert problem.hint.startswith(f"{name} has W8A8 static, W8A8 dynamic")
    assert " in " not in problem.hint, "groups may be of other sizes than the presets'"


@pytest.mark.parametrize(
    ("config", "files", "name"),
    [
        ({}, (), "float"),
        ({"quantization_config": None}, (), "float"),
        ({"quantization_config": {"quant_method": "fp8"}}, (), "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, (), "compressed-tensors"),
        ({"quantization_config": {"quant_method": "gptq"}}, (), "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, (), "awq"),
        ({"quantization_config": {"quant_method": "hqq"}}, (), "hqq"),
        ({"quantization_config": {"bits": 4}}, (), "unknown"),
        ({}, ("quantization_description.json",), "golden-stick"),
        ({}, ("quant_model_description.json",), "modelslim"),
        # msmodelslim leaves the method of what it was made from
        ({"quantization_config": {"quant_method": "fp8"}}, ("quant_model_description.json",), "modelslim"),
    ],
)
def test_a_folder_shows_its_format(
    make_folder: Callable[..., Path], config: dict[str, Any], files: tuple[str, ...], name: str
) -> None:
    from safetensors.torch import save

    content = {"config.json": config, "model.safetensors": save(damaged())} | {file: {} for file in files}
    checkpoint = Checkpoint.open(make_folder(content))
    found = formats.of(checkpoint)
    assert found.name == name
    assert found.is_float == (name in ("float", "fp8", "gptq", "awq", "mxfp4"))
    assert not {str(file) for file in companions(checkpoint)} & set(files)


def test_every_format_is_known_by_its_name_and_says_what_it_is() -> None:
    names = [each.name for each in formats.FORMATS]
    assert len(set(names)) == len(names)
    assert set(formats.NAMES) == {name for name in names if name not in ("float", "fp8", "gptq", "awq", "mxfp4")}
    assert all(each.title for each in formats.FORMATS)
    for name in formats.NAMES:
        assert formats.get(name).name == name
        for scheme in formats.get(name).schemes:
            assert scheme.weights.nbytes((8, 256)) <= formats.get(name).nbytes((8, 256), scheme)


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize("static", [True, False])
def test_the_size_of_a_layer_is_estimated(
    random_layer: Callable[..., QuantizedLinear], name: str, static: bool
) -> None:
    layer = random_layer(48, 64, static=static)
    made = formats.get(name).tensors("q", layer, torch.float32).values()
    assert sum(tensor.nbytes for tensor in made) == formats.get(name).nbytes((48, 64), layer.scheme)


# ------------------------------------------------------------------ int4 of modelslim


def int4(out: int, width: int, group: int | None, seed: int = 0) -> QuantizedLinear:
    """Random integers of 4 bits; scales are bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
    shape = (out,) if group is None else (out, width // group)
    scale = (torch.rand(shape, generator=generator) / 64 + 1e-3).bfloat16().float()
    scheme = named("w4a8-channel" if group is None else f"w4a8-g{group}")
    assert scheme is not None
    return QuantizedLinear(scheme, weight, scale)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize(("name", "parts"), [("up_proj", 1), ("down_proj", 16)])
def test_modelslim_of_four_bits(tmp_path: Path, group: int | None, name: str, parts: int) -> None:
    form, layer, full = formats.get("modelslim"), int4(16, 64, group), f"model.layers.0.mlp.{name}"
    with CheckpointWriter(tmp_path / "m", form) as writer:
        writer.add_linear(full, layer, torch.bfloat16)
        writer.finish(None, {"dtype": "bfloat16"}, {})
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert_same(linear(checkpoint, full), layer)
    description = json.loads((tmp_path / "m" / "quant_model_description.json").read_text())
    wanted = {"version": "1.0.0", "model_quant_type": "W4A8_DYNAMIC", "group_size": group or 0}
    assert wanted.items() <= description.items()
    assert {description[each] for each in checkpoint.names} == {"W4A8_DYNAMIC"}
    packed = checkpoint.tensor(f"{full}.weight").numpy().astype(np.int16)
    np.testing.assert_array_equal(((packed & 15) ^ 8) - 8, layer.weight.numpy()[::2])  # the low bits first
    np.testing.assert_array_equal(packed >> 4, layer.weight.numpy()[1::2])
    scale = layer.weight_scale.numpy().reshape(16, -1)
    values = layer.weight.numpy() * np.repeat(scale, 64 // scale.shape[1], axis=1)
    bias = 8 * values.reshape(16, parts, -1).sum(axis=2)
    np.testing.assert_allclose(checkpoint.tensor(f"{full}.scale_bias").numpy(), bias, rtol=1e-5, atol=1e-6)
    for part in ("weight_scale", "weight_scale_second"):  # a runtime holds them in the model's dtype
        if f"{full}.{part}" in checkpoint:
            stored = checkpoint.tensor(f"{full}.{part}")
            assert torch.equal(stored.bfloat16().float(), stored)


def test_golden_stick_of_four_bits(tmp_path: Path) -> None:
    """Scales are the bits of a float32, as Golden Stick's convert_fp32_to_uint64 makes them."""
    layer, name = int4(16, 64, 16), "model.layers.0.mlp.experts.0.up_proj"
    with CheckpointWriter(tmp_path / "m", formats.get("golden-stick")) as writer:
        writer.add_linear(name, layer, torch.bfloat16)
        writer.finish(None, {"dtype": "bfloat16"}, {})
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert_same(linear(checkpoint, name), layer)
    bits = checkpoint.tensor(f"{name}.weight_scale").view(torch.int64).numpy()
    np.testing.assert_array_equal(bits, layer.weight_scale.numpy().view(np.uint32).astype(np.int64))
    description = json.loads((tmp_path / "m" / "quantization_description.json").read_text())
    assert description["group_size"] == 16
    assert description[f"{name}.weight"] == "W4A8_DYNAMIC"
    # mindspore-gs 1.4.1 doesn't say the size; the scales' shape does.
    del description["group_size"]
    (tmp_path / "m" / "quantization_description.json").write_text(json.dumps(description))
    assert_same(linear(Checkpoint.open(tmp_path / "m"), name), layer)
    rows: list[dict[str, Any]] = []
    report: Any = SimpleNamespace(progress=lambda *_: None, item=rows.append)
    ranges.main({"model": str(tmp_path / "m"), "filter": r"\.weight$"}, report)
    (row,) = rows
    assert (row["scale_min"], row["scale_max"]) == (float(layer.weight_scale.min()), float(layer.weight_scale.max()))


@pytest.mark.parametrize("bits", [0, -1, 1 << 40, 0x7F800000])
def test_scales_that_are_no_floats(tmp_path: Path, bits: int) -> None:
    layer, name = int4(16, 64, 16), "model.layers.0.mlp.experts.0.up_proj"
    with CheckpointWriter(tmp_path / "m", formats.get("golden-stick")) as writer:
        writer.add_linear(name, layer, torch.bfloat16)
        writer.finish(None, {"dtype": "bfloat16"}, {})
    (file,) = (tmp_path / "m").glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{name}.weight_scale"].view(torch.int64)[3, 1] = bits
    save_file(tensors, file)
    with pytest.raises(InputError, match="weight_scale holds a number that is not positive and finite"):
        linear(Checkpoint.open(tmp_path / "m"), name)


def test_modelslim_has_one_group_size() -> None:
    schemes = {f"model.layers.0.mlp.{part}_proj": named(f"w4a8-g{size}") for part, size in (("up", 32), ("down", 64))}
    (problem,) = (each for each in formats.get("modelslim").problems(schemes) if "group_size" in each.text)
    assert "not 32 and 64" in problem.text


@pytest.mark.parametrize(
    ("name", "shape", "says"), [("up_proj", (12, 64), "8 output"), ("o_proj", (16, 40), "16 cards")]
)
def test_shapes_that_four_bits_do_not_fit(name: str, shape: tuple[int, int], says: str) -> None:
    scheme = named("w4a8-g8")
    assert scheme is not None
    form = formats.get("modelslim")
    assert says in str(form.misfit(name, shape, scheme))
    assert form.misfit("up_proj", (16, 40), scheme) is None
    assert form.misfit(name, shape, W8A8_DYNAMIC) is None
