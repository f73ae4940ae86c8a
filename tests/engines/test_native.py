"""Whole models through the native engine, judged by transformers and by plain rounding done here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint

LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
FUSED_GROUPS = [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]


@dataclass(frozen=True)
class Kind:
    """An architecture: its config, its groups of linears, and the tensors besides them that smoothing may rewrite."""

    config: dict[str, Any]
    groups: list[list[str]]
    rewritten: str = r"(input|post_attention)_layernorm\.weight"
    model_type: str = ""


GEMMA_NORMS = r"(input|pre_feedforward)_layernorm\.weight"
KINDS = {
    "llama": Kind({}, LLAMA_GROUPS),
    "llama-tied": Kind({"tie_word_embeddings": True}, LLAMA_GROUPS, model_type="llama"),
    "qwen2": Kind({}, LLAMA_GROUPS, r"(input|post_attention)_layernorm\.weight|self_attn\.v_proj\.bias"),
    "qwen3": Kind({}, LLAMA_GROUPS),
    "mistral": Kind({"sliding_window": 8}, LLAMA_GROUPS),
    "gemma2": Kind({"query_pre_attn_scalar": 32, "sliding_window": 8}, LLAMA_GROUPS, GEMMA_NORMS),
    "gemma3_text": Kind({"query_pre_attn_scalar": 32, "sliding_window": 8}, LLAMA_GROUPS, GEMMA_NORMS),
    "phi3": Kind({"sliding_window": 8}, FUSED_GROUPS),
}


@dataclass(frozen=True)
class Made:
    """A model and what the engine made of it."""

    kind: Kind
    model: Path
    output: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def models(make_model: Callable[..., Path]) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            kind = KINDS[name]
            folders[name] = make_model(kind.model_type or name, name=f"native-{name}", **kind.config)
        return folders[name]

    return make


@pytest.fixture(scope="module", params=list(KINDS))
def made(
    request: pytest.FixtureRequest,
    models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    quantize: Callable[..., Any],
) -> Made:
    model, output = models(request.param), tmp_path_factory.mktemp("native") / "out"
    return Made(KINDS[request.param], model, output, quantize(model, output))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def weights_digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """On text that calibration has not seen (random tokens), mean over the vocabulary taken away."""
    ids = torch.randint(4, 500, (4, 48), generator=torch.Generator().manual_seed(77))
    found = model(ids, use_cache=False).logits.float()
    return found - found.mean(dim=-1, keepdim=True)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@contextmanager
def rounded_to_nearest(model: Any, calibration: torch.Tensor | None = None) -> Iterator[None]:
    """Plain W8A8 of every linear inside the decoder layers: no smoothing, no clipping.

    Per token, but where calibration text is given per tensor with its extremes inside attention.
    """
    linears = {n: m for n, m in model.base_model.layers.named_modules() if isinstance(m, nn.Linear)}
    ranges: dict[str, tuple[float, float]] = {}
    if calibration is not None:
        for name, module in linears.items():
            if "attn" in name:
                module.register_forward_pre_hook(
                    lambda _m, args, name=name: ranges.__setitem__(
                        name,
                        (
                            min(float(args[0].min()), ranges.get(name, (0.0, 0.0))[0]),
                            max(float(args[0].max()), ranges.get(name, (0.0, 0.0))[1]),
                        ),
                    )
                )
        model(calibration, use_cache=False)
        for module in linears.values():
            module._forward_pre_hooks.clear()

    def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
        if name in ranges:
            low, high = ranges[name]
            step = (high - low) / 255
            zero = round(-128 - low / step)
            return ((x / step + zero).round().clamp(-128, 127) - zero) * step
        steps = x.abs().amax(dim=-1, keepdim=True) / 127.5
        return (x / steps).round().clamp(-128, 127) * steps

    saved = {}
    for name, module in linears.items():
        saved[name] = module.weight.clone()
        steps = module.weight.abs().amax(dim=1, keepdim=True) / 127.5
        module.weight.copy_((module.weight / steps).round().clamp(-128, 127) * steps)
        module.register_forward_pre_hook(lambda _m, args, name=name: rounded(name, args[0]))
    yield
    for name, module in linears.items():
        module._forward_pre_hooks.clear()
        module.weight.copy_(saved[name])


def test_groups_in_the_report(made: Made) -> None:
    rows = made.report["layers"]
    assert [row["linears"] for row in rows] == made.kind.groups * 2
    assert {row["layer"] for row in rows} == {"model.layers.0", "model.layers.1"}
    assert all(0 < row["relative_error"] < 0.01 for row in rows)


def test_transformers_computes_nearly_the_same_logits(made: Made) -> None:
    original = load(made.model)
    reference = logits(original)
    with rounded_to_nearest(original):
        nearest = relative(logits(original), reference)
    assert torch.equal(logits(original), reference)
    assert relative(logits(load(made.output)), reference) < 1.05 * nearest


def test_untouched_tensors_are_bit_identical(made: Made) -> None:
    before, after = tensors(made.model), tensors(made.output)
    quantized = {f"{row['layer']}.{name}.weight" for row in made.report["layers"] for name in row["linears"]}
    assert quantized <= before.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        if name in quantized:
            assert after[name].dtype == torch.int8
            continue
        assert after[name].dtype == tensor.dtype == torch.bfloat16
        if not re.fullmatch(rf"model\.layers\.\d\.({made.kind.rewritten})", name):
            assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
    extra = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert extra == {"weight_scale"}
    assert len(after) == len(before) + len(quantized)


def test_report_is_complete(made: Made) -> None:
    written = json.loads((made.output / "qtool.json").read_text())
    assert written == {key: value for key, value in made.report.items() if key in written}
    for key in ("qtool", "versions", "engine", "device", "source", "format", "recipe", "scheme", "layers", "threads"):
        assert key in written
    assert written["versions"].keys() == {"python", "torch", "transformers"}
    assert written["calibration"]["samples"] == 8
    assert written["calibration"]["seq_len"] == 64
    assert re.fullmatch("[0-9a-f]{64}", written["calibration"]["sha256"])
    assert written["recipe"]["name"] == "default"
    assert str(made.model) not in json.dumps(written)
    errors = [row["relative_error"] for row in written["layers"]]
    assert written["mean_relative_error"] == pytest.approx(sum(errors) / len(errors))


def test_tokenizer_and_config_come_along(made: Made) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (made.model / name).exists():
            assert (made.output / name).read_bytes() == (made.model / name).read_bytes()
    config = json.loads((made.output / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((made.model / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_static_attention(name: str, models: Callable[[str], Path], tmp_path: Path, quantize: Any) -> None:
    from transformers import AutoTokenizer

    from qtool.calibration.text import load as load_text

    model, output = models(name), tmp_path / "out"
    report = quantize(model, output, scheme="w8a8")
    for row in report["layers"]:
        assert row["activations"] == ("static" if "attn" in row["linears"][0] else "dynamic")
    after = tensors(output)
    scales = {key for key in after if key.endswith("input_scale")}
    assert scales
    assert all("self_attn" in key for key in scales)
    original = load(model)
    reference = logits(original)
    ids = load_text("builtin", AutoTokenizer.from_pretrained(model), samples=8, seq_len=64, seed=0).ids
    with rounded_to_nearest(original, ids):
        nearest = relative(logits(original), reference)
    assert relative(logits(load(output)), reference) < 1.1 * nearest


@pytest.mark.parametrize(
    ("model_type", "config", "said"),
    [
        (
            "jetmoe",
            {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "kv_channels": 16},
            "of a kind that qtool doesn't read",
        ),
        ("xlm", {"emb_dim": 64, "n_layers": 2, "n_heads": 4}, "XLMWithLMHeadModel one by one"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_architecture_that_is_not_supported_is_bad_input(
    model_type: str,
    config: dict[str, Any],
    said: str,
    dry_run: bool,
    make_model: Callable[..., Path],
    run_qtool: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = make_model(model_type, name=f"native-{model_type}", **config)
    done = run_qtool("quantize", model, "-o", tmp_path / "out", *["--dry-run"] * dry_run)
    assert (done.code, done.stdout) == (2, "")
    assert re.search(said, done.stderr.replace("\n", " "))
    assert not any(tmp_path.iterdir())


def test_biases_that_smoothing_changed_are_read_back_from_modelslim(
    models: Callable[[str], Path], tmp_path: Path, quantize: Any
) -> None:
    model, output = models("qwen2"), tmp_path / "out"
    quantize(model, output, scheme="w8a8", format="modelslim")
    before, after, checkpoint = tensors(model), tensors(output), Checkpoint.open(output)
    moved = 0.0
    for name in (name.removesuffix(".bias") for name in after if name.endswith("_proj.bias")):
        linear, bias = formats.of(checkpoint).read_linear(checkpoint, name), after[f"{name}.bias"]
        assert linear is not None
        assert linear.bias is not None
        assert torch.equal(linear.bias, bias)
        # vllm-ascend adds quant_bias alone: what it holds beyond the input offset's share is the bias
        steps = after[f"{name}.quant_bias"] + after[f"{name}.input_offset"] * after[f"{name}.weight"].sum(dim=1)
        step = after[f"{name}.deq_scale"]
        assert float((steps.double() * step.double() - bias.double()).div(step).abs().max()) < 0.51
        moved = max(moved, float((bias - before[f"{name}.bias"]).abs().max()))
    assert moved > 0.01


def test_deterministic(models: Callable[[str], Path], tmp_path: Path, quantize: Any) -> None:
    for run in ("a", "b"):
        quantize(models("qwen2"), tmp_path / run, scheme="w8a8")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_the_number_of_threads_hardly_matters(models: Callable[[str], Path], tmp_path: Path, quantize: Any) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            quantize(models("llama"), tmp_path / str(count), scheme="w8a8")
    finally:
        torch.set_num_threads(threads)
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    for name, tensor in one.items():  # sums are split differently: values near a tie may round the other way
        if tensor.dtype == torch.int8:
            assert (tensor == two[name]).float().mean() > 0.99, name
        else:
            torch.testing.assert_close(tensor, two[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_sharded_source_gives_the_same_tensors(
    name: str, models: Callable[[str], Path], tmp_path: Path, quantize: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(models(name)).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    quantize(models(name), tmp_path / "from-one")
    quantize(tmp_path / "sharded", tmp_path / "from-many")
    ours, theirs = tensors(tmp_path / "from-many"), tensors(tmp_path / "from-one")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_shards_of_limited_size(models: Callable[[str], Path], tmp_path: Path, quantize: Any) -> None:
    quantize(models("llama"), tmp_path / "one")
    quantize(models("llama"), tmp_path / "many", export={"format": "compressed-tensors", "max_shard_gb": 0.0001})
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        assert {index[name] for name in load_file(file)} == {file.name}
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys() == index.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
