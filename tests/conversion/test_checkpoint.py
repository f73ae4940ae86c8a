"""Between W8A8 formats: what is in the files afterwards, read with the safetensors library and checked with numpy."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint import formats
from qtool.checkpoint.writer import CheckpointWriter, Sharding
from qtool.conversion.checkpoint import main
from qtool.errors import InputError
from qtool.quant.types import QuantizedLinear
from tests.fake_quantized import FakeQuantized

Layers = dict[str, QuantizedLinear]
Quantize = Callable[..., Layers]
PAIRS = list(itertools.permutations(formats.NAMES, 2))


class Report:
    """Stands in for a worker's report."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.done: list[int] = []

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        assert (stage, unit) == ("converting", "bytes")
        assert done <= total
        self.done.append(done)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def convert(source: Path, output: Path, to: str, report: Any = None) -> dict[str, Any]:
    return main(
        {"source": str(source), "output": str(output), "to": to, "overwrite": False}, cast(Any, report or Report())
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def qwen2(make_model: Callable[..., Path]) -> Path:
    """Its q, k and v have biases, its head is tied, and every runtime reads what it says it is, dynamic layers too."""
    model = make_model("qwen2", tie_word_embeddings=True, name="conversion")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["DeepseekV3ForCausalLM"]}))
    return model


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("mode", ["static", "mixed", "dynamic"])
def test_there_and_back(
    tmp_path: Path, qwen2: Path, quantize_folder: Quantize, first: str, second: str, mode: str
) -> None:
    """There: the same integers, and the scales that were made. Back: the same files."""
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    made = quantize_folder(qwen2, source, first, mode)
    result = convert(source, there, second)
    assert result["input_scale_rounding"] == 0  # what the fixture wrote fits every format
    assert result["integers"] == sum(layer.weight.numel() for layer in made.values())
    assert (result["from"], result["to"]) == (first, second)
    converted, float_model = tensors(there), tensors(qwen2)
    for name, layer in made.items():
        own = {key.removeprefix(f"{name}."): t for key, t in converted.items() if key.startswith(f"{name}.")}
        assert own["weight"].dtype == torch.int8
        assert torch.equal(own["weight"], layer.weight)
        assert torch.equal(own["weight_scale"].float().reshape(-1), layer.weight_scale)
        if layer.is_static:
            assert set(own["input_scale"].float().reshape(-1).tolist()) == {layer.input_scale}
            offset = own["input_zero_point" if second == "compressed-tensors" else "input_offset"]
            assert set(offset.reshape(-1).tolist()) == {layer.input_zero_point}
        if layer.bias is not None:
            assert torch.equal(own["bias"], layer.bias)
    for name, tensor in float_model.items():
        if name.rpartition(".")[0] not in made:
            assert torch.equal(converted[name], tensor), name
    convert(there, back, first)
    assert_equal(tensors(back), tensors(source))
    files = {file.name for file in source.iterdir()}
    assert {file.name for file in back.iterdir()} == files
    for file in files - {"qtool.json"}:
        if file.endswith(".json"):
            assert json.loads((back / file).read_text()) == json.loads((source / file).read_text()), file
    note = json.loads((back / "qtool.json").read_text())
    assert note["made_by"] == "a test"
    assert note["format"] == first
    assert [(step["from"], step["to"]) for step in note["converted"]] == [(first, second), (second, first)]


def test_many_shards_and_every_byte_of_progress(tmp_path: Path, tiny_llama: Path, quantize_folder: Quantize) -> None:
    source = tmp_path / "source"
    quantize_folder(tiny_llama, source, "golden-stick", "static", sharding=Sharding(60_000))
    assert len(list(source.glob("*.safetensors"))) > 2
    report = Report()
    result = convert(source, tmp_path / "out", "compressed-tensors", report)
    assert report.done[-1] == sum(tensor.nbytes for tensor in tensors(source).values())
    assert report.done == sorted(report.done)
    assert result["nbytes"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    convert(tmp_path / "out", tmp_path / "back", "golden-stick")
    assert_equal(tensors(tmp_path / "back"), tensors(source))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tiny_llama / file).read_bytes()


def test_experts_and_latent_attention_go_through_as_names(tmp_path: Path) -> None:
    """The layers of a DeepSeek-V3: attention static but for kv_b_proj, experts dynamic, router and its bias float."""
    from tests.checkpoint.conftest import round_layer

    generator = torch.Generator().manual_seed(0)

    def weight(out: int, in_: int) -> torch.Tensor:
        return torch.randn(out, in_, generator=generator) * 0.05

    made: Layers = {}
    kept = {"model.embed_tokens.weight": weight(32, 16).bfloat16(), "lm_head.weight": weight(32, 16).bfloat16()}
    for i in range(2):
        layer = f"model.layers.{i}"
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj"):
            made[f"{layer}.self_attn.{name}"] = round_layer(weight(24, 16), inputs=(0.015625, -9))
        experts = [f"experts.{e}." for e in range(12)] + ["shared_experts."]
        for expert in [""] if i == 0 else experts:  # the first layer is dense
            for name in ("gate_proj", "up_proj", "down_proj"):
                made[f"{layer}.mlp.{expert}{name}"] = round_layer(weight(24, 16))
        kept[f"{layer}.self_attn.kv_b_proj.weight"] = weight(40, 8).bfloat16()
        kept[f"{layer}.mlp.gate.weight"] = weight(12, 16).bfloat16()
        kept[f"{layer}.mlp.gate.e_score_correction_bias"] = torch.randn(12, generator=generator)
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16"}
    with CheckpointWriter(tmp_path / "0", formats.get("golden-stick"), sharding=Sharding(15_000)) as writer:
        for name, tensor in kept.items():
            writer.add(name, tensor)
        for name, linear in made.items():
            writer.add_linear(name, linear, torch.bfloat16)
        writer.finish(None, config, {})
    for step, target in enumerate(["modelslim", "compressed-tensors", "golden-stick"]):
        convert(tmp_path / str(step), tmp_path / str(step + 1), target)
        found = tensors(tmp_path / str(step + 1))
        for name, linear in made.items():
            assert torch.equal(found[f"{name}.weight"], linear.weight)
        for name, tensor in kept.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert_equal(tensors(tmp_path / "3"), tensors(tmp_path / "0"))


# ------------------------------------------------------------------ what the peers make of it


@pytest.mark.parametrize("name", ["golden-stick", "modelslim"])
def test_transformers_computes_what_the_other_format_meant(
    tmp_path: Path, qwen2: Path, quantize_folder: Quantize, name: str
) -> None:
    """In float32, where transformers doesn't round the scales."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "float32"
    AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.float32).save_pretrained(source)
    made = quantize_folder(source, tmp_path / "quantized", name, "mixed")
    convert(tmp_path / "quantized", tmp_path / "out", "compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        plain = reference(ids).logits
        for layer, linear in made.items():
            reference.set_submodule(layer, FakeQuantized(linear))
        expected, actual = reference(ids).logits, loaded(ids).logits
    noise = (expected - plain).norm()
    assert noise > 0.001 * plain.norm()  # quantization does show
    # A value near the middle between two integers may round either way: a few of them move the logits a little.
    assert (actual - expected).norm() < 0.05 * noise


def test_vllm_ascend_would_find_its_parameters(tmp_path: Path, qwen2: Path, quantize_folder: Quantize) -> None:
    """What vllm-ascend (main of August 2026: quantization/methods/w8a8_static.py, w8a8_dynamic.py, modelslim_config.py)
    declares for its linear layers, and asks of the description: each `.weight` of a layer, of embedding and head."""
    made = quantize_folder(qwen2, tmp_path / "ct", "compressed-tensors", "mixed")
    convert(tmp_path / "ct", tmp_path / "ms", "modelslim")
    found = tensors(tmp_path / "ms")
    description = json.loads((tmp_path / "ms" / "quant_model_description.json").read_text())
    for name, layer in made.items():
        out_size, in_size = layer.weight.shape
        # part -> (dtypes that copy into the parameter without loss of a digit, shape)
        declared: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "weight": ((torch.int8,), (out_size, in_size)),
            "weight_scale": ((torch.bfloat16, torch.float32), (out_size, 1)),
            "weight_offset": ((torch.bfloat16, torch.float32), (out_size, 1)),
        }
        if layer.is_static:
            declared |= {
                "input_scale": ((torch.bfloat16, torch.float32), (1,)),
                "input_offset": ((torch.int8, torch.float32), (1,)),
                "quant_bias": ((torch.int32,), (out_size,)),
                "deq_scale": ((torch.float32,), (out_size,)),
            }
            assert torch.equal(found[f"{name}.input_scale"].bfloat16().float(), found[f"{name}.input_scale"])
        own = {key.removeprefix(f"{name}.") for key in found if key.startswith(f"{name}.")} - {"bias"}
        assert own == set(declared)
        for part, (dtypes, shape) in declared.items():
            assert found[f"{name}.{part}"].dtype in dtypes, part
            assert found[f"{name}.{part}"].shape == shape, part
        assert description[f"{name}.weight"] == ("W8A8" if layer.is_static else "W8A8_DYNAMIC")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert description[name] == "FLOAT"


# ------------------------------------------------------------------ back to bfloat16


@pytest.mark.parametrize("name", formats.NAMES)
def test_bfloat16_is_what_the_integers_stand_for(
    tmp_path: Path, qwen2: Path, quantize_folder: Quantize, name: str
) -> None:
    made = quantize_folder(qwen2, tmp_path / "source", name, "mixed")
    result = convert(tmp_path / "source", tmp_path / "float", "bfloat16")
    found, original = tensors(tmp_path / "float"), tensors(qwen2)
    assert found.keys() == original.keys()
    for key, tensor in original.items():
        owner = key.rpartition(".")[0]
        assert (found[key].dtype, found[key].shape) == (torch.bfloat16, tensor.shape)
        if owner in made and key.endswith(".weight"):
            scale = made[owner].weight_scale.numpy()[:, None].astype(np.float64)
            exact = made[owner].weight.numpy() * scale
            step = np.exp2(np.floor(np.log2(np.abs(exact) + 1e-30))) * 2.0**-7  # between bfloat16's numbers
            assert (np.abs(found[key].double().numpy() - exact) <= step / 2 * 1.0001).all(), key
        else:
            assert torch.equal(found[key], tensor), key
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config == json.loads((qwen2 / "config.json").read_text())
    assert result["nbytes"] == sum(tensor.nbytes for tensor in original.values())


def test_a_float32_model_becomes_bfloat16(tmp_path: Path, qwen2: Path, quantize_folder: Quantize) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(qwen2, dtype=torch.float32).save_pretrained(tmp_path / "float32")
    quantize_folder(tmp_path / "float32", tmp_path / "source", "compressed-tensors", "static")
    convert(tmp_path / "source", tmp_path / "float", "bfloat16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "float").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "float" / "config.json").read_text())["dtype"] == "bfloat16"


# ------------------------------------------------------------------ scales


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit a model of a single file in place."""
    (file,) = folder.glob("*.safetensors")
    found = load_file(file)
    edit(found)
    save_file(found, file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(found, file.name)}))


O_PROJ, Q_PROJ = "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("target", ["golden-stick", "modelslim"])
def test_a_scale_is_rounded_to_the_models_dtype_and_that_is_said(
    tmp_path: Path, qwen2: Path, quantize_folder: Quantize, target: str
) -> None:
    made = quantize_folder(qwen2, tmp_path / "source", "compressed-tensors", "static")
    scale = np.float32(0.0123456)
    change(tmp_path / "source", lambda t: t.update({f"{O_PROJ}.input_scale": torch.tensor([scale])}))
    result = convert(tmp_path / "source", tmp_path / "out", target)
    rounded = torch.tensor(scale).bfloat16().double().item()
    assert result["input_scale_rounding"] == pytest.approx(abs(rounded - float(scale)) / float(scale), rel=1e-9)
    found = tensors(tmp_path / "out")
    assert set(found[f"{O_PROJ}.input_scale"].double().tolist()) == {rounded}
    expected = np.float32(rounded) * made[O_PROJ].weight_scale.numpy()
    np.testing.assert_allclose(found[f"{O_PROJ}.deq_scale"].numpy(), expected, rtol=1e-7)
    assert torch.equal(found[f"{O_PROJ}.weight"], made[O_PROJ].weight)
    note = json.loads((tmp_path / "out" / "qtool.json").read_text())["converted"]
    assert note[0]["input_scale_rounding"] == result["input_scale_rounding"]


def test_a_bias_that_only_quant_bias_holds(tmp_path: Path, qwen2: Path, quantize_folder: Quantize) -> None:
    """As vllm-ascend computes: y = (q·Wᵀ + quant_bias) · deq_scale, whether there is a tensor `bias` or not."""
    made = quantize_folder(qwen2, tmp_path / "source", "modelslim", "static")
    bias = made[Q_PROJ].bias
    assert bias is not None
    deq_scale = tensors(tmp_path / "source")[f"{Q_PROJ}.deq_scale"]
    change(tmp_path / "source", lambda t: t.pop(f"{Q_PROJ}.bias"))
    convert(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    found = tensors(tmp_path / "out")[f"{Q_PROJ}.bias"]
    assert ((found.double() - bias.double()).abs() <= deq_scale / 2 + bias.abs() * 2**-8).all()


# ------------------------------------------------------------------ refusals


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def quantization(folder: Path, **changes: Any) -> None:
    config(
        folder, quantization_config=json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    )


def description(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])


def narrow(folder: Path) -> None:
    """A float16 model, one input scale of which is smaller than float16 knows."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        for name, tensor in found.items():
            if tensor.dtype == torch.bfloat16:
                found[name] = tensor.half()
        found[f"{O_PROJ}.input_scale"] = torch.tensor([3e-7])

    change(folder, edit)


DESCRIPTION = "quant_model_description.json"
REFUSALS: dict[str, tuple[str, str, Callable[[Path], object], str, str]] = {
    # name: (source format, mode, what is done to it, target, what the error says)
    "the same format": ("golden-stick", "static", lambda m: None, "golden-stick", "is golden-stick already"),
    "dynamic for llama": (
        "compressed-tensors",
        "mixed",
        lambda m: config(m, architectures=["LlamaForCausalLM"]),
        "golden-stick",
        "dynamic activations.* MindFormers; MindFormers doesn.t support them for LlamaForCausalLM",
    ),
    "another method": (
        "compressed-tensors",
        "static",
        lambda m: config(m, quantization_config={"quant_method": "hqq"}),
        "modelslim",
        "quantized with hqq",
    ),
    "a quantized cache": (
        "compressed-tensors",
        "static",
        lambda m: quantization(m, kv_cache_scheme={"num_bits": 8}),
        "modelslim",
        "keys and values are quantized, but not in the way",
    ),
    "another quantized cache": (
        "modelslim",
        "static",
        lambda m: description(m, DESCRIPTION, kv_cache_type="C8"),
        "compressed-tensors",
        "keys and values are kept as int8, which is not converted",
    ),
    "four bits": (
        "modelslim",
        "static",
        lambda m: description(m, DESCRIPTION, **{f"{O_PROJ}.weight": "W4A4_DYNAMIC"}),
        "compressed-tensors",
        f"{O_PROJ}: quantized, but not W8A8",
    ),
    "a norm that is not float": (
        "modelslim",
        "static",
        lambda m: description(m, DESCRIPTION, **{"model.norm.weight": "W8A8"}),
        "compressed-tensors",
        "model.norm.weight is W8A8, which is not converted",
    ),
    "integers without a scheme": (
        "modelslim",
        "static",
        lambda m: description(m, DESCRIPTION, **{f"{O_PROJ}.weight": "FLOAT"}),
        "compressed-tensors",
        "nothing says how it is quantized",
    ),
    "a tensor nobody knows": (
        "golden-stick",
        "static",
        lambda m: change(m, lambda t: t.update({f"{O_PROJ}.smooth_scale": torch.ones(3)})),
        "compressed-tensors",
        "has a tensor 'smooth_scale'",
    ),
    "scales per input channel": (
        "golden-stick",
        "static",
        lambda m: change(m, lambda t: t[f"{O_PROJ}.input_scale"][3].mul_(2)),
        "compressed-tensors",
        "input_scale differs per channel",
    ),
    "siblings that differ": (
        "compressed-tensors",
        "static",
        lambda m: change(m, lambda t: t.update({f"{Q_PROJ}.input_scale": torch.tensor([0.0625])})),
        "golden-stick",
        "differ from those of",
    ),
    "fused layers of two kinds": (
        "modelslim",
        "static",
        lambda m: description(m, DESCRIPTION, **{f"{Q_PROJ}.weight": "W8A8_DYNAMIC"}),
        "compressed-tensors",
        "qkv_proj is one layer at run time",
    ),
    "a scale too small for float16": (
        "compressed-tensors",
        "static",
        narrow,
        "golden-stick",
        "F16 changes 3e-07 by",
    ),
    "float32 and static": (
        "compressed-tensors",
        "static",
        lambda m: change(m, lambda t: t.update({n: x.float() for n, x in t.items() if x.is_floating_point()})),
        "modelslim",
        "bfloat16 and float16 only",
    ),
    "a truncated file": ("golden-stick", "static", truncate, "bfloat16", "truncated: 1000 bytes are missing"),
    "asymmetric weights": (
        "golden-stick",
        "static",
        lambda m: change(m, lambda t: t[f"{O_PROJ}.weight_offset"].fill_(1)),
        "bfloat16",
        "asymmetric weights are not supported",
    ),
    "a quant_bias of another layer": (
        "golden-stick",
        "static",
        lambda m: change(m, lambda t: t[f"{Q_PROJ}.quant_bias"].add_(1000)),
        "bfloat16",
        "quant_bias does not fit",
    ),
    "a scale that is no number": (
        "golden-stick",
        "static",
        lambda m: change(m, lambda t: t[f"{O_PROJ}.weight_scale"].fill_(float("nan"))),
        "compressed-tensors",
        "not positive and finite",
    ),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, qwen2: Path) -> Callable[[Quantize, str, str], Path]:
    """quantized(quantize_folder, format, mode) -> a model, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(quantize: Quantize, name: str, mode: str) -> Path:
        if (name, mode) not in made:
            made[name, mode] = tmp_path_factory.mktemp("quantized") / "model"
            quantize(qwen2, made[name, mode], name, mode)
        return made[name, mode]

    return make


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, quantized: Callable[..., Path], quantize_folder: Quantize, name: str
) -> None:
    form, mode, spoil, target, says = REFUSALS[name]
    shutil.copytree(quantized(quantize_folder, form, mode), tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(InputError, match=says):
        convert(tmp_path / "source", tmp_path / "out", target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("target", "says"), [("bfloat16", "is already float"), ("modelslim", "not quantized")])
def test_a_float_model_is_to_be_quantized(tmp_path: Path, tiny_llama: Path, target: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        convert(tiny_llama, tmp_path / "out", target)
    assert "qtool quantize" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("architecture", "mode", "says"),
    [
        ("LlamaForCausalLM", "mixed", "support them for LlamaForCausalLM"),
        ("Qwen2ForCausalLM", "mixed", "ignores the quantization"),
        ("Qwen3ForCausalLM", "mixed", "doesn't load their scales"),
        ("Qwen3MoeForCausalLM", "static", "ignores the quantization"),
    ],
)
def test_what_vllm_mindspore_would_not_read_does_not_become_golden_stick(
    tmp_path: Path, qwen2: Path, quantize_folder: Quantize, architecture: str, mode: str, says: str
) -> None:
    quantize_folder(qwen2, tmp_path / "source", "compressed-tensors", mode)
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": [architecture]}))
    with pytest.raises(InputError, match=says):
        convert(tmp_path / "source", tmp_path / "out", "golden-stick")
    assert not (tmp_path / "out").exists()


def test_what_needs_a_setting_goes_with_a_word_of_warning(
    tmp_path: Path, qwen2: Path, quantize_folder: Quantize
) -> None:
    quantize_folder(qwen2, tmp_path / "source", "compressed-tensors", "static")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["Qwen2ForCausalLM"]}))
    report = Report()
    convert(tmp_path / "source", tmp_path / "out", "golden-stick", report)
    assert len(report.warnings) == 1
    assert "VLLM_MS_MODEL_BACKEND=native" in report.warnings[0]
