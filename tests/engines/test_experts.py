"""Mixtures of experts through `qtool quantize`, judged by transformers, by numpy, and by vLLM where it can run them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.errors import InputError
from tests import families, simulate

Run = Callable[..., Any]
MIXTURES = [name for name, config in families.FAMILIES.items() if families.routed(config)]
SAMPLES, LENGTH = 16, 128
SIZE = ("--samples", SAMPLES, "--seq-len", LENGTH, "--threads", 1)
SMALL = ("--samples", 2, "--seq-len", 16, "--threads", 1)

# Rounding to nearest and nothing else: every integer can be foretold.
PLAIN = r"""
name: plain
description: rounding to nearest, no smoothing, no clipping
schemes:
  w8a8:
    - layers: '(.*\.)?lm_head'
      quantize: false
    - layers: '.*\.(kv_b_proj|eh_proj|shared_head\..*)'
      quantize: false
    - layers: '.*\.(mlp|block_sparse_moe)\.gate'
      quantize: false
    - layers: '.*'
      smoothing: none
      clip: false
      rounding: nearest
"""


@dataclass(frozen=True)
class Source:
    """A model, and the same in floats where it is FP8.

    Attributes:
        folder: what qtool gets.
        floats: every float weight of it, as float32.
    """

    model_type: str
    kind: str
    folder: Path
    floats: Path

    @property
    def stored(self) -> torch.dtype:
        """The type that the float model's tensors have: FP8 counts as bfloat16."""
        return getattr(torch, self.kind) if self.kind != "fp8" else torch.bfloat16


@pytest.fixture(scope="module")
def sources(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """sources(model_type, "bfloat16" | "float16" | "float32" | "fp8") -> Source, never to be written into."""
    known: dict[tuple[str, str], Source] = {}

    def make(model_type: str, kind: str = "bfloat16") -> Source:
        if (model_type, kind) not in known:
            folder = tmp_path_factory.mktemp("sources") / f"{model_type}-{kind}"
            dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
            floats = families.make(
                folder, model_type, tiny_tokenizer, dtype=dtype, shards=3 if kind == "float16" else 1
            )
            if kind == "fp8":
                folder = families.to_fp8(floats, folder.with_name(f"{folder.name}-blocks"), shards=3)
                floats = families.from_fp8(folder, folder.with_name(f"{folder.name}-floats"))
            known[model_type, kind] = Source(model_type, kind, folder, floats)
        return known[model_type, kind]

    return make


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipes") / "plain.yaml"
    file.write_text(PLAIN)
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text: the first topics of CPython's help. `unseen` is of the others."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[:50]))
    return file


@pytest.fixture(scope="module")
def calibration(text: Path, tiny_tokenizer: Any) -> torch.Tensor:
    """The tokens that qtool calibrates on."""
    from qtool.calibration.text import load

    return load(str(text), tiny_tokenizer, samples=SAMPLES, seq_len=LENGTH, seed=0).ids


@pytest.fixture(scope="module")
def unseen(tiny_tokenizer: Any) -> torch.Tensor:
    from pydoc_data.topics import topics

    ids = tiny_tokenizer("\n\n".join(topics[name] for name in sorted(topics)[50:]))["input_ids"]
    return torch.tensor(ids[: 32 * 64]).view(32, 64)


@pytest.fixture(scope="module")
def made(sources: Callable[..., Source], text: Path, run_qtool: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """made(model_type, kind, scheme) -> (Source, what the recipe that fits the model makes of it)."""
    known: dict[tuple[str, str, str], Path] = {}

    def make(model_type: str, kind: str = "bfloat16", scheme: str = "w8a8") -> tuple[Source, Path]:
        source = sources(model_type, kind)
        if (model_type, kind, scheme) not in known:
            output = tmp_path_factory.mktemp("made") / f"{model_type}-{kind}-{scheme}"
            options = ("--scheme", scheme, "--format", "compressed-tensors", "--calibration", text)
            done = run_qtool("quantize", source.folder, "-o", output, *options, *SIZE)
            assert done.code == 0, done.stderr
            known[model_type, kind, scheme] = output
        return source, known[model_type, kind, scheme]

    return make


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "qtool.json").read_text())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------------------------------------- tokens per expert


@pytest.mark.parametrize(("model_type", "kind"), [*((name, "bfloat16") for name in MIXTURES), ("deepseek_v3", "fp8")])
def test_experts_saw_the_tokens_that_transformers_sends_them(
    made: Run, calibration: torch.Tensor, model_type: str, kind: str
) -> None:
    source, output = made(model_type, kind)
    config = json.loads((source.folder / "config.json").read_text())
    expected = simulate.choices(simulate.load_float(source.floats), calibration)
    rows = {row["layer"]: row for row in report(output)["experts"]}
    assert rows.keys() == expected.keys()
    for layer, counts in expected.items():
        found = rows[layer]["tokens"]
        assert len(found) == families.routed(config)
        assert sum(found) == sum(counts) == SAMPLES * LENGTH * config["num_experts_per_tok"]
        # the engine runs in bfloat16: scores that nearly tie may fall the other way
        assert sum(abs(a - b) for a, b in zip(found, counts, strict=True)) <= 0.02 * sum(counts)
        assert counts[families.STARVED] == found[families.STARVED] == 0
        # Golden Stick's recipe for DeepSeek rounds experts to nearest, which takes no tokens
        short = {str(expert): 128 - seen for expert, seen in enumerate(found) if seen < 128}
        assert rows[layer]["topped_up"] == ({} if model_type == "deepseek_v3" else short)


# ---------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize(
    ("model_type", "kind", "format"),
    [
        *((name, "bfloat16", "compressed-tensors") for name in MIXTURES),
        ("deepseek_v3", "fp8", "compressed-tensors"),
        ("mixtral", "fp8", "compressed-tensors"),
        ("qwen3_moe", "float16", "compressed-tensors"),
        ("deepseek_v3", "fp8", "golden-stick"),
        ("glm4_moe", "bfloat16", "modelslim"),
    ],
)
def test_rounding_to_nearest_gives_the_integers_of_numpy(
    sources: Callable[..., Source], plain: Path, quantize: Run, tmp_path: Path, model_type: str, kind: str, format: str
) -> None:
    source, output = sources(model_type, kind), tmp_path / "out"
    quantize(source.folder, output, "w8a8", format, str(plain))
    config = json.loads((source.folder / "config.json").read_text())
    # Only bfloat16 models keep their scales in bfloat16, and Golden Stick's format none.
    stored = torch.bfloat16 if source.stored == torch.bfloat16 and format != "golden-stick" else torch.float32
    found, floats = families.load(output), families.load(source.floats)
    before = set(families.load(source.folder))
    described = {} if format == "compressed-tensors" else _description(output)
    quantized = 0
    for name, tensor in floats.items():
        linear = name.removesuffix(".weight")
        if linear != name and simulate.is_quantized(linear, config["num_hidden_layers"]):
            integers, scale = simulate.rounded_rows(tensor.float().numpy(), stored)
            assert found[name].dtype == torch.int8
            assert torch.equal(found[name], torch.from_numpy(integers)), name
            assert torch.equal(found[f"{name}_scale"].float().flatten(), torch.from_numpy(scale)), name
            assert not described or described[name] == "W8A8_DYNAMIC"
            quantized += 1
        else:  # what was FP8 and stays float, kv_b_proj and the last layer's, is bfloat16 now
            was_fp8 = f"{name}_scale_inv" in before
            original = tensor.to(torch.bfloat16) if was_fp8 else families.load(source.folder)[name]
            assert same(found[name], original), name
            assert not described or described[name] == "FLOAT"
    assert quantized > 3 * families.routed(config)
    extra = {name.rpartition(".")[2] for name in found.keys() - floats.keys()}
    assert extra <= {"weight_scale", "weight_offset"}
    written = json.loads((output / "config.json").read_text())
    assert written.pop("quantization_config", {}).get("quant_method") != "fp8"
    config.pop("quantization_config", None)
    assert {key: written[key] for key in config} == config


def test_dry_run_foresees_the_size_of_what_was_fp8(sources: Callable[..., Source], made: Run, run_qtool: Run) -> None:
    """What stays float takes two bytes in place of one, and loses its scales."""
    source, output = made("deepseek_v3", "fp8")
    done = run_qtool("quantize", source.folder, "-o", output.with_name("none"), "--dry-run", "--json")
    assert done.code == 0, done.stderr
    size = sum(tensor.nbytes for tensor in families.load(output).values())
    assert json.loads(done.stdout)["output_bytes"] == pytest.approx(size, rel=0.02)


def _description(folder: Path) -> dict[str, str]:
    return json.loads(next(folder.glob("quant*_description.json")).read_text())


# ---------------------------------------------------------------------------------------------- what it costs


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize(
    ("model_type", "kind"), [*((name, "bfloat16") for name in MIXTURES), ("deepseek_v3", "fp8"), ("qwen3_moe", "fp8")]
)
def test_costs_less_than_rounding_to_nearest(
    made: Run,
    calibration: torch.Tensor,
    unseen: torch.Tensor,
    tmp_path: Path,
    record_property: Run,
    model_type: str,
    kind: str,
    scheme: str,
) -> None:
    source, output = made(model_type, kind, scheme)
    original = simulate.load_float(source.floats)
    routes = simulate.routes(original, unseen)
    reference = simulate.logits(original, unseen)
    nearest = simulate.nearest(source.floats, tmp_path / "nearest", calibration if scheme == "w8a8" else None)
    found, plainly = (
        simulate.divergence(simulate.logits(simulate.load(folder), unseen, routes), reference)
        for folder in (output, nearest)
    )
    record_property("divergence", f"{found:.4f}, rounded to nearest {plainly:.4f}")
    if (model_type, scheme) == ("deepseek_v3", "w8a8-dynamic"):  # that is rounding to nearest
        assert found == pytest.approx(plainly, rel=0.1)
    else:
        assert 0 < found < 0.9 * plainly


# ---------------------------------------------------------------------------------------------- bad input


def _damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    tensors, config = families.load(source), json.loads((source / "config.json").read_text())
    change(tensors, config)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    (target / "config.json").write_text(json.dumps(config))
    families.save(tensors, target)
    return target


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def _nan(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    codes = tensors[EXPERT].view(torch.uint8).clone()
    codes[3, 7] = 0x7F
    tensors[EXPERT] = codes.view(torch.float8_e4m3fn)


def _nan_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{EXPERT}_scale_inv"][0, 0] = float("nan")


def _wrong_shape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{EXPERT}_scale_inv"] = tensors[f"{EXPERT}_scale_inv"][:-1].clone()


def _narrow_expert(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[EXPERT] = tensors[EXPERT][:, :-32].clone()


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], Any], str]] = {
    "a missing expert": (lambda tensors, _: tensors.pop(EXPERT), r"experts\.5\b|expert 5\b"),
    "missing scales": (lambda tensors, _: tensors.pop(f"{EXPERT}_scale_inv"), re.escape(f"{EXPERT}_scale_inv")),
    "scales of a wrong shape": (_wrong_shape, re.escape(f"{EXPERT}_scale_inv")),
    "a NaN among the codes": (_nan, re.escape(EXPERT)),
    "a NaN among the scales": (_nan_scale, re.escape(f"{EXPERT}_scale_inv")),
    "an expert of a wrong shape": (_narrow_expert, re.escape(EXPERT)),
    "FP8 that config.json does not mention": (lambda _, config: config.pop("quantization_config"), r"F8_E4M3"),
    "more experts than in config.json": (lambda _, config: config.update(n_routed_experts=4), r"expert|e_score|gate"),
    "fewer experts than in config.json": (lambda _, config: config.update(n_routed_experts=12), r"expert|e_score|gate"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_bad_input(
    sources: Callable[..., Source], quantize: Run, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    folder = _damaged(sources("deepseek_v3", "fp8").folder, tmp_path / "damaged", change)
    with pytest.raises(InputError, match=message) as caught:
        quantize(folder, tmp_path / "out", recipe="deepseek-v3")
    assert caught.value.where
    assert "model.layers." in f"{caught.value} {caught.value.where} {caught.value.hint}"
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


def test_the_command_line_says_what_is_damaged(sources: Callable[..., Source], run_qtool: Run, tmp_path: Path) -> None:
    folder = _damaged(sources("deepseek_v3", "fp8").folder, tmp_path / "damaged", _nan)
    done = run_qtool("quantize", folder, "-o", tmp_path / "out", "--scheme", "w8a8-dynamic", *SMALL)
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert EXPERT in next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_infinite_weights_of_an_expert_are_bad_input(
    sources: Callable[..., Source], quantize: Run, tmp_path: Path, kind: str
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"  # of the expert that sees no token

    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[name][-1, -1] = float("inf")

    folder = _damaged(sources("mixtral", kind).folder, tmp_path / "damaged", change)
    with pytest.raises(InputError, match=re.escape(name)):
        quantize(folder, tmp_path / "out", recipe="mixtral")
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "kind"), [*((name, "bfloat16") for name in MIXTURES), ("deepseek_v3", "fp8")])
def test_evaluation_says_what_the_imitation_says(
    made: Run, run_qtool: Run, text: Path, tiny_tokenizer: Any, model_type: str, kind: str
) -> None:
    source, output = made(model_type, kind)
    size = ("--text", text, "--windows", "2", "--length", "48", "--json")
    done = run_qtool("eval", source.folder, output, *size)
    assert done.code == 0, done.stderr
    ids = torch.tensor(tiny_tokenizer(text.read_text())["input_ids"][: 2 * 48]).view(2, 48)
    logits = [
        simulate.logits(model, ids)[:, :-1] for model in (simulate.load_float(source.floats), simulate.load(output))
    ]
    expected = simulate.divergence(logits[1], logits[0])
    assert json.loads(done.stdout)["kl_divergence"]["value"] == pytest.approx(expected, rel=0.05)
