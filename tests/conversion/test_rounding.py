"""Integers rounded again to float8: against torch's own casts, and through transformers' and vLLM's readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.conversion import for_scheme
from qtool.conversion.rounding import Change, to_float8
from qtool.errors import InputError
from qtool.quant.types import QuantizedLinear
from qtool.scheme import FP8_BLOCK, FP8_DYNAMIC, W8A8, Scheme, named
from tests.checkpoint import served
from tests.checkpoint.conftest import round_layer
from tests.checkpoint.readings import READERS, run

BLOCK = 128
SCHEMES = {"fp8-dynamic": FP8_DYNAMIC, "fp8-block": FP8_BLOCK}
IDS = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(0))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_the_book(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales (in bfloat16, as the model is) of a float32 weight, every number by itself."""
    peak = weight.abs()
    if scheme == "fp8-block":
        out, width = weight.shape
        peak = peak.view(out // BLOCK, BLOCK, width // BLOCK, BLOCK).amax(dim=(1, 3))
    else:
        peak = peak.amax(dim=1, keepdim=True)
    scale = (peak.double() / 448).float().bfloat16()
    wide = scale.float()
    if scheme == "fp8-block":
        wide = wide.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    """All sizes are whole blocks; q, k and v have biases."""
    return make_model(
        "qwen2", seed=3, hidden_size=256, intermediate_size=256, num_key_value_heads=4, num_attention_heads=8
    )


class Float8(torch.nn.Module):
    """A layer with e4m3 codes and a scale per token, or for each 128 channels of one, in float arithmetic."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scheme: str) -> None:
        super().__init__()
        wide = scale.float()
        if scheme == "fp8-block":
            wide = wide.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        self.weight, self.bias, self.size = codes.float() * wide, bias, BLOCK if scheme == "fp8-block" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (-1, self.size or x.shape[-1]))
        scale = parts.abs().amax(-1, keepdim=True) / 448
        x = ((parts / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
        return torch.nn.functional.linear(x, self.weight, None if self.bias is None else self.bias.float())


@pytest.mark.parametrize(
    ("name", "mode", "scheme"),
    [
        ("compressed-tensors", "mixed", "fp8-dynamic"),
        ("golden-stick", "static", "fp8-block"),
        ("modelslim", "mixed", "fp8-dynamic"),
    ],
)
def test_w8a8_becomes_float8(
    source: Path, quantize_folder: Any, run_qtool: Callable[..., Any], tmp_path: Path, name: str, mode: str, scheme: str
) -> None:
    """Every code and scale, and what transformers computes with them."""
    made: dict[str, QuantizedLinear] = quantize_folder(source, tmp_path / "int8", name, mode)
    done = run_qtool("convert", tmp_path / "int8", "--scheme", scheme.upper(), "--json")
    assert done.code == 0, done.stderr
    result, output = json.loads(done.stdout), tmp_path / f"int8-{scheme}"
    assert Path(result["output"]) == output
    assert (result["from"], result["to"], result["integers"]) == (name, "compressed-tensors", 0)
    assert result["layers"] == {SCHEMES[scheme].label: len(made)}
    found, kept = tensors(output), tensors(source)
    before = {layer: linear.weight.float() * linear.weight_scale[:, None] for layer, linear in made.items()}
    error = total = 0.0
    for layer, weight in before.items():
        codes, scale = by_the_book(weight, scheme)
        assert torch.equal(found[f"{layer}.weight"].view(torch.uint8), codes.view(torch.uint8)), layer
        assert torch.equal(found[f"{layer}.weight_scale"].float(), scale.float())
        assert not {f"{layer}.input_scale", f"{layer}.input_zero_point"} & found.keys()
        after = Float8(codes, scale, None, scheme).weight
        error += float((after - weight).double().square().sum())
        total += float(weight.double().square().sum())
        for part in ("weight", "weight_scale", "bias"):
            kept.pop(f"{layer}.{part}", None)
            if part != "bias":
                found.pop(f"{layer}.{part}")
        if (bias := made[layer].bias) is not None:
            assert torch.equal(found.pop(f"{layer}.bias"), bias)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[each], kept[each]) for each in kept)
    assert result["weight_rounding"] == pytest.approx((error / total) ** 0.5, rel=1e-6)
    assert 0.015 < result["weight_rounding"] < 0.035  # three bits of a mantissa
    assert f"{result['weight_rounding']:.2%}" in done.stderr
    note = json.loads((output / "qtool.json").read_text())
    assert (note["format"], note["scheme"]) == ("compressed-tensors", scheme)
    assert note["converted"][-1]["weight_rounding"] == result["weight_rounding"]
    expected, computed = logits(source, made, before, scheme), by_transformers(output)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def logits(source: Path, made: dict[str, QuantizedLinear], weights: dict[str, torch.Tensor], scheme: str) -> Any:
    """Of the float model with layers by the book."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for layer, weight in weights.items():
        model.set_submodule(layer, Float8(*by_the_book(weight, scheme), made[layer].bias, scheme))
    with torch.no_grad():
        return model(IDS).logits[0]


def by_transformers(folder: Path) -> torch.Tensor:
    """Through compressed-tensors' own loader: every tensor finds its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits[0]
    return found


@pytest.mark.parametrize("first", ["w4a8-g32", "w8a16", "fp8-block"])
def test_whatever_is_quantized_can_be_rounded(
    source: Path, run_qtool: Callable[..., Any], tmp_path: Path, first: str
) -> None:
    options = ("--samples", "2", "--seq-len", "32", "--engine", "native", "--output", tmp_path / "first")
    assert run_qtool("quantize", source, "--scheme", first, *options).code == 0
    done = run_qtool("convert", tmp_path / "first", "--scheme", "fp8-dynamic", "--output", tmp_path / "made", "--json")
    assert done.code == 0, done.stderr
    old, new = Checkpoint.open(tmp_path / "first"), Checkpoint.open(tmp_path / "made")
    for layer in formats.of(old).layers(old):
        before, after = (formats.of(each).read_linear(each, layer) for each in (old, new))
        if before is not None:
            codes, _ = by_the_book(before.dequantize(), "fp8-dynamic")
            assert after is not None
            assert torch.equal(after.weight.view(torch.uint8), codes.view(torch.uint8)), layer
    assert not any(name.endswith(("packed", "weight_shape")) for name in new.names)


def test_a_second_rounding_of_some_layers_alone(
    source: Path, run_qtool: Callable[..., Any], tmp_path: Path, quantize: Any
) -> None:
    """Layers that have the scheme already stay as they are, and so do keys and values in the cache."""
    policies = [
        {"layers": "lm_head", "quantize": False},
        {"layers": ".*mlp.*", "scheme": "FP8-dynamic", "smoothing": "none"},
        {"layers": ".*", "scheme": "W8A8-dynamic", "smoothing": "none", "rounding": "nearest"},
    ]
    quantize(
        source, tmp_path / "first", scheme="mixed", default_scheme="mixed", schemes={"mixed": policies}, kv_cache="fp8"
    )
    done = run_qtool("convert", tmp_path / "first", "--scheme", "fp8-dynamic", "--output", tmp_path / "made", "--json")
    assert done.code == 0, done.stderr
    old, new = tensors(tmp_path / "first"), tensors(tmp_path / "made")
    kept = [tensor.numel() for name, tensor in old.items() if ".mlp." in name and name.endswith("weight")]
    assert json.loads(done.stdout)["integers"] == sum(kept)
    for name, tensor in old.items():
        if ".mlp." in name or name.endswith(("k_scale", "v_scale")):
            assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == "float"
    again = run_qtool("convert", tmp_path / "made", "--scheme", "fp8-dynamic")
    assert again.code == 2
    assert "are FP8 dynamic already" in again.stderr


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        (("--scheme", "w4a16"), "'w4a16' is none of fp8-dynamic, fp8-block", "need calibration"),
        (("--scheme", "fp8-dynamic", "--to", "gguf"), "gguf has no fp8-dynamic", "Leave out --to"),
        (("--scheme", "fp8-dynamic", "--to", "bfloat16"), "bfloat16 has no fp8-dynamic", "Leave out --to"),
        (("--scheme", "fp8-dynamic", "--to", "modelslim"), "modelslim can't express FP8 dynamic", ""),
        (("--scheme", "fp8-block"), "a weight of 64 x 160 is not a whole number of blocks", "fp8-dynamic has a scale"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_llama: Path,
    quantize_folder: Any,
    run_qtool: Callable[..., Any],
    tmp_path: Path,
    options: tuple[str, ...],
    says: str,
    hint: str,
) -> None:
    quantize_folder(tiny_llama, tmp_path / "int8", "compressed-tensors", "dynamic")
    done = run_qtool("convert", tmp_path / "int8", *options)
    said = " ".join(done.stderr.split())
    assert (done.code, done.stdout) == (2, "")
    assert says in said
    assert hint in said
    assert [each.name for each in tmp_path.iterdir()] == ["int8"]


def test_float_models_are_to_be_quantized_and_quantized_ones_to_be_converted(
    tiny_llama: Path, quantize_folder: Any, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """Each of the two commands names the other where it is the right one."""
    done = run_qtool("convert", tiny_llama, "--scheme", "fp8-dynamic", "--output", tmp_path / "made")
    assert done.code == 2
    assert "".join(f"qtool quantize {tiny_llama} --scheme fp8-dynamic".split()) in "".join(done.stderr.split())
    quantize_folder(tiny_llama, tmp_path / "int8", "compressed-tensors", "dynamic")
    done = run_qtool("quantize", tmp_path / "int8", "--scheme", "fp8-dynamic", "--output", tmp_path / "made")
    assert done.code == 2
    assert "".join(f"qtool convert {tmp_path / 'int8'} --scheme fp8-dynamic".split()) in "".join(done.stderr.split())


def test_the_python_interface(tiny_llama: Path, quantize_folder: Any, tmp_path: Path) -> None:
    import qtool

    quantize_folder(tiny_llama, tmp_path / "int8", "compressed-tensors", "dynamic")
    assert qtool.convert(tmp_path / "int8", scheme="fp8-dynamic") == tmp_path / "int8-fp8-dynamic"
    with pytest.raises(InputError, match="has no fp8-dynamic"):
        qtool.convert(tmp_path / "int8", "gptq", scheme="fp8-dynamic")


@pytest.mark.vllm
def test_vllm_loads_models_with_experts(tiny_tokenizer: Any, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """Files for Ascend become float8 for GPUs: by vLLM's own code, every tensor finds its parameter."""
    folders = []
    for architecture in ("DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"):
        model = served.make(architecture, tmp_path / f"{architecture}-float", tiny_tokenizer)
        served.quantize(model, tmp_path / architecture, "modelslim", "w8a8")
        done = run_qtool("convert", tmp_path / architecture, "--scheme", "fp8-dynamic")
        assert done.code == 0, done.stderr
        folders.append(tmp_path / f"{architecture}-fp8-dynamic")
    (reader,) = (each for each in READERS if each.runtime == "vllm")
    for line in run(reader, folders, tmp_path / "work"):
        assert (line.get("error"), line["untouched"], line["unread"]) == (None, [], []), line


@pytest.mark.parametrize("scheme", SCHEMES)
def test_some_rows_at_a_time_or_all(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """What is a float at a time decides about memory alone."""
    layer = round_layer(torch.randn(300, 150, generator=torch.Generator().manual_seed(0)), inputs=(0.1, 3))
    made, changes = [], []
    for chunk in (1, 150 * 130, 1 << 22):
        monkeypatch.setattr("qtool.conversion.rounding._CHUNK", chunk)
        changes.append(Change())
        made.append(to_float8(layer, SCHEMES[scheme], lambda scale: scale, changes[-1]))
    for each in made[1:]:
        assert torch.equal(each.weight.view(torch.uint8), made[0].weight.view(torch.uint8))
        assert torch.equal(each.weight_scale, made[0].weight_scale)
    assert len({round(each.relative, 9) for each in changes}) == 1
    assert (made[0].input_scale, made[0].input_zero_point) == (None, None)


@pytest.mark.parametrize("scheme", [W8A8, named("w4a16")])
def test_what_needs_calibration_is_not_made_so(scheme: Scheme) -> None:
    layer = round_layer(torch.ones(8, 128))
    with pytest.raises(ValueError, match="needs calibration"):
        to_float8(layer, scheme, lambda scale: scale, Change())


def test_names() -> None:
    assert for_scheme(None, "FP8-Block") == ("compressed-tensors", "fp8-block")
    assert for_scheme("modelslim", "fp8-dynamic") == ("modelslim", "fp8-dynamic")
