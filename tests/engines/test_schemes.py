"""Precisions beyond W8A8, from the command line to the logits that transformers computes."""

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
from qtool.checkpoint.summary import schemes
from qtool.model.decoder import DecoderStream
from qtool.scheme import W8A8, W8A8_DYNAMIC, name_of, named

LABELS = {
    "w8a8-asymmetric": "W8A8 dynamic asymmetric",
    "w8a16": "W8A16",
    "w4a16-g32": "W4A16 in groups of 32",
    "w4a16-channel": "W4A16",
    "w4a16-asymmetric-g32": "W4A16 with zero points in groups of 32",
    "w4a16-asymmetric-channel": "W4A16 with zero points",
    "w4a8-g32": "W4A8 dynamic in groups of 32",
    "fp8-dynamic": "FP8 dynamic",
    "fp8-block": "FP8 dynamic in blocks of 128 x 128",
}


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path]) -> Path:
    # q, k and v have biases; all sizes are multiples of a block's
    return make_model(
        "qwen2", seed=3, hidden_size=256, intermediate_size=256, num_key_value_heads=4, num_attention_heads=8
    )


@pytest.fixture(scope="module", params=LABELS)
def made(
    request: pytest.FixtureRequest, source: Path, run_qtool: Callable[..., Any], tmp_path_factory: Any
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("schemes") / request.param
    options = ("--samples", "4", "--seq-len", "64", "--engine", "native")
    done = run_qtool("quantize", source, "--scheme", request.param, "--output", folder, *options)
    assert done.code == 0, done.stderr
    return request.param, folder


def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of `qtool eval`: fake quantization, one layer after the other."""
    stream = DecoderStream(Checkpoint.open(folder), dtype=torch.float32)
    with torch.no_grad():
        batch = stream.prologue(ids)
        for index in range(stream.depth):
            with stream.layer(index) as layer:
                batch = stream.run(index, layer, batch)
        hidden = stream.head.leaving(batch)[0]
        vocabulary = stream.weights.shape("model.embed_tokens.weight")[0]
        return stream.head.logits(hidden, stream.head.rows(0, vocabulary))


def theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model(ids).logits[0]


def test_transformers_computes_what_eval_does(made: tuple[str, Path], source: Path) -> None:
    name, folder = made
    ids = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    expected, plain = theirs(folder, ids), theirs(source, ids)
    found = ours(folder, ids)
    noise = float((expected - plain).norm() / plain.norm())
    assert 1e-4 < noise < (0.06 if name.startswith("w8") else 0.3 if name.startswith("fp8") else 0.6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_every_command_knows_it(made: tuple[str, Path], run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    name, folder = made
    seen = run_qtool("inspect", folder, "--json")
    layers = json.loads(seen.stdout)["layers"]
    assert {row["scheme"] for row in layers if row["count"] == 2} == {LABELS[name]}
    done = run_qtool("convert", folder, "--to", "bfloat16", "--output", tmp_path / "float", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == {LABELS[name]: 14}
    quantized, back = Checkpoint.open(folder), Checkpoint.open(tmp_path / "float")
    for layer in schemes(quantized):
        linear = formats.of(quantized).read_linear(quantized, layer)
        if linear is not None:
            assert torch.equal(back.tensor(f"{layer}.weight"), linear.dequantize().bfloat16())
    other = run_qtool("convert", folder, "--to", "modelslim", "--output", tmp_path / "other")
    if name not in ("w8a8-asymmetric", "w4a8-g32"):
        assert other.code == 2
        assert "can't express" in other.stderr
        return
    assert other.code == 0, other.stderr
    # Zero points of tokens are what modelslim lacks; no tensor of the checkpoint depends on them.
    symmetric = "what enters 14 layers is quantized symmetrically" in " ".join(other.stderr.split())
    assert symmetric == (name == "w8a8-asymmetric")
    converted = Checkpoint.open(tmp_path / "other")
    for layer, scheme in schemes(quantized).items():
        if scheme is not None:
            found = formats.of(converted).read_linear(converted, layer)
            kept = formats.of(quantized).read_linear(quantized, layer)
            assert found is not None
            assert kept is not None
            assert found.scheme == (W8A8_DYNAMIC if symmetric else scheme)
            assert torch.equal(found.weight, kept.weight)
            torch.testing.assert_close(found.weight_scale, kept.weight_scale, rtol=0, atol=0)


def test_unknown_and_impossible_schemes(source: Path, run_qtool: Callable[..., Any]) -> None:
    unknown = run_qtool("quantize", source, "--scheme", "w5a5")
    assert unknown.code == 2
    assert "w4a16" in unknown.stderr


def test_sizes_that_do_not_fit(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    wide = run_qtool("quantize", tiny_llama, "--scheme", "W4A16", "--dry-run")
    assert wide.code == 2
    assert "w4a16-g64" in wide.stderr
    other = run_qtool("quantize", tiny_llama, "--scheme", "w4a16-asymmetric", "--dry-run")
    assert other.code == 2
    assert "w4a16-asymmetric-g64" in other.stderr
    blocks = run_qtool("quantize", tiny_llama, "--scheme", "fp8-block", "--dry-run")
    assert blocks.code == 2
    assert "fp8-dynamic" in blocks.stderr


def test_names() -> None:
    for name in LABELS:
        scheme = named(name.upper())
        assert scheme is not None
        assert scheme.label == LABELS[name]
    four = named("w4a16")
    assert four is not None
    assert (name_of(four), four.weights.group_size) == ("W4A16", 128)
    assert named("w8a8-g") is None
    assert named("w8a8-g0") is None
    assert named("") is None


def test_linears_that_share_their_input_may_differ(
    make_model: Callable[..., Path], run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """In Phi, q, k, v and fc1 do. Without smoothing, each gets the very numbers that it has in a uniform model."""
    model, kinds = make_model("phi"), {"mlp.fc1": "W8A8-dynamic", "self_attn.[qkv]_proj": "W8A8"}
    recipe = "{{name: x, description: x, default_scheme: s, schemes: {{s: [{}]}}}}"
    policies = [f"{{layers: '.*\\.{name}', scheme: {scheme}, smoothing: none}}" for name, scheme in kinds.items()]
    tensors, found = {}, {}
    for name, wanted in (("both", policies), ("fc1", policies[:1]), ("qkv", policies[1:])):
        (tmp_path / f"{name}.yaml").write_text(recipe.format(", ".join(wanted)))
        options = ("--recipe", tmp_path / f"{name}.yaml", "--samples", "4", "--seq-len", "64")
        done = run_qtool("quantize", model, "--output", tmp_path / name, *options)
        assert done.code == 0, done.stderr
        tensors[name] = load_file(tmp_path / name / "model.safetensors")
        found[name] = {layer: scheme for layer, scheme in schemes(Checkpoint.open(tmp_path / name)).items() if scheme}
    assert found["both"] == found["fc1"] | found["qkv"]
    assert set(found["both"].values()) == {W8A8, W8A8_DYNAMIC}
    for name in ("fc1", "qkv"):
        for layer in found[name]:
            own = [key for key in tensors[name] if key.startswith(f"{layer}.")]
            assert own
            assert all(torch.equal(tensors["both"][key], tensors[name][key]) for key in own), layer
