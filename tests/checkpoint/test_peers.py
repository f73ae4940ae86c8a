"""What the runtimes on Ascend read in our checkpoints, by their own code, as far as it runs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from tests import families
from tests.fake_quantized import FakeQuantized
from tests.managed import REPOSITORY, VLLM_ASCEND, unpacked

pytestmark = pytest.mark.peers

HERE = Path(__file__).parent


@pytest.mark.parametrize(("model_type", "mode"), [("llama", "mixed"), ("qwen2", "static")])
def test_vllm_ascend_reads_modelslim(
    make_model: Callable[..., Path], quantize_folder: Callable[..., Any], tmp_path: Path, model_type: str, mode: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(model_type, num_attention_heads=2, num_key_value_heads=1)  # heads of 32 in Qwen2 too
    made = quantize_folder(source, tmp_path / "quantized", "modelslim", mode)
    ids = torch.randint(4, 500, (48,), generator=torch.Generator().manual_seed(0))
    path = os.pathsep.join(map(str, (REPOSITORY, unpacked(VLLM_ASCEND))))
    command = [HERE / "vllm_ascend_on_cpu.py", tmp_path / "quantized", json.dumps(ids.tolist()), tmp_path / "logits.pt"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        plain = reference(ids[None]).logits[0, :-1]
        for name, layer in made.items():
            reference.set_submodule(name, FakeQuantized(layer))
        expected = reference(ids[None]).logits[0, :-1]
    noise = float((expected - plain).norm())
    assert noise > 0.01 * plain.norm()  # quantization does show
    # it computes in bfloat16, which adds noise of its own
    assert float((found[:, : expected.shape[1]] - expected).norm()) < 0.7 * noise


def nibbles(tensors: dict[str, Any], name: str) -> tuple[Any, Any]:
    """A layer of 4 bits in modelslim's files, by their own words: integers and scales of each, [out, in]."""
    packed = tensors[f"{name}.weight"].astype(np.int16)
    fields = np.stack((packed & 15, (packed >> 4) & 15), axis=1).reshape(2 * len(packed), -1)
    scale = tensors[f"{name}.weight_scale"] * tensors[f"{name}.weight_scale_second"]
    return np.where(fields > 7, fields - 16, fields), np.repeat(scale, fields.shape[1] // scale.shape[1], axis=1)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_vllm_ascend_reads_four_bits(
    model_type: str, tiny_tokenizer: Any, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """Its matrices, made ready for its kernels, are what the files stand for and what qtool meant."""
    source = families.make(tmp_path / "float", model_type, tiny_tokenizer)
    options = ("--scheme", "w4a8-g32", "--format", "modelslim", "--samples", "4", "--seq-len", "64")
    done = run_qtool("quantize", source, "--output", tmp_path / "made", "--engine", "native", *options)
    assert done.code == 0, done.stderr
    path = os.pathsep.join(map(str, (REPOSITORY, unpacked(VLLM_ASCEND))))
    command = [sys.executable, *map(str, (HERE / "vllm_ascend_w4a8.py", tmp_path / "made", tmp_path / "out.npz"))]
    read = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr[-3000:]
    line = json.loads(read.stdout.splitlines()[-1])
    assert not line["untouched"]
    assert not line["unread"]
    stored = {
        name: each for file in (tmp_path / "made").glob("*.safetensors") for name, each in load_file(file).items()
    }
    tensors = {name: (each.float() if each.dtype == torch.bfloat16 else each).numpy() for name, each in stored.items()}
    checkpoint = Checkpoint.open(tmp_path / "made")
    form, found = formats.of(checkpoint), np.load(tmp_path / "out.npz")
    assert len(found)
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    fused |= {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
    for key in found:
        owner, _, part = key.removesuffix(".bias").rpartition(".")
        experts = range(len(found[key])) if part in ("w13", "w2") else [None]
        prefix = owner.removesuffix(".routed_experts")
        for expert in experts:
            expected = []
            for part_of in fused.get(part, (part,)):
                name = f"{prefix}.{part_of}" if expert is None else f"{prefix}.{expert}.{part_of}"
                integers, scale = nibbles(tensors, name)
                linear = form.read_linear(checkpoint, name)
                assert linear is not None
                np.testing.assert_array_equal(linear.dequantize().numpy(), (integers * scale).astype(np.float32))
                expected.append(8 * (integers * scale).sum(1) if key.endswith(".bias") else (integers * scale).T)
            given = found[key] if expert is None else found[key][expert]
            # the sixteen parts of a bias are summed in another order
            np.testing.assert_allclose(given, np.concatenate(expected, axis=-1), rtol=1e-5, atol=1e-4)


def test_vllm_ascend_loads_int8_caches(tiny_tokenizer: Any, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """Of the models that the table names. Of others it doesn't, and qtool says so of the file."""
    options = ("--format", "modelslim", "--kv-cache", "int8", "--engine", "native", "--samples", "4", "--seq-len", "64")
    made = []
    dynamic = ((model_type, "w8a8-dynamic") for model_type in ("qwen3", "glm4_moe", "llama"))
    for model_type, scheme in (*dynamic, ("qwen3", "w8a8"), ("qwen3", "w4a8-g32")):
        source = tmp_path / f"{model_type} float"
        if not source.exists():
            families.make(source, model_type, tiny_tokenizer)
        made.append(tmp_path / f"{model_type} {scheme}")
        done = run_qtool("quantize", source, "--output", made[-1], "--scheme", scheme, *options)
        assert done.code == 0, done.stderr
        assert ("loads the scales of int8 keys and values for" in done.stderr) == (model_type == "llama")
    path = os.pathsep.join(map(str, (REPOSITORY, unpacked(VLLM_ASCEND))))
    command = [sys.executable, *map(str, (HERE / "vllm_ascend_reads.py", *made))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]
    for folder, line in zip(made, lines, strict=True):
        if not folder.name.startswith("llama"):
            assert "error" not in line, line
            assert not [name for name in line["untouched"] if "cache" in name]
            assert not [name for name in line["unread"] if "cache" in name]
        else:
            assert "error" in line


EXPERTS_OF_FOUR_BITS = {
    "name": "mine",
    "description": "as deepseek-r1-a8w4, in groups that fit a tiny model",
    "extends": "deepseek-v3",
    "default_scheme": "a8w4",
    "schemes": {
        "a8w4": [
            {"layers": r"(.*\.)?lm_head|.*\.(kv_b_proj|embed_tokens)|.*\.mlp\.gate", "quantize": False},
            {
                "layers": r".*\.mlp\.experts\..*",
                "weights": {"num_bits": 4, "group_size": 16},
                "activations": {"mode": "dynamic"},
                "smoothing": "none",
            },
            {"layers": ".*", "activations": {"mode": "dynamic"}, "smoothing": "none", "rounding": "nearest"},
        ]
    },
}


def test_mindformers_reads_experts_of_four_bits(
    tiny_tokenizer: Any, golden_stick: dict[str, str], run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """DeepSeek-V3's grouped matrices in its memory are those of the files, and so is the bias that it makes of them."""
    source = families.make(tmp_path / "float", "deepseek_v3", tiny_tokenizer, num_nextn_predict_layers=0)
    (tmp_path / "mine.yaml").write_text(json.dumps(EXPERTS_OF_FOUR_BITS))
    options = ("--recipe", tmp_path / "mine.yaml", "--format", "golden-stick", "--samples", "4", "--seq-len", "64")
    done = run_qtool("quantize", source, "--output", tmp_path / "made", "--engine", "native", *options)
    assert done.code == 0, done.stderr
    path = os.pathsep.join(str(unpacked(each)) for each in ("mindformers==1.7.0", "vllm-mindspore==0.5.1"))
    script, out = HERE / "mindformers_w4a8.py", tmp_path / "out.npz"
    read = subprocess.run(
        [golden_stick["QTOOL_GOLDEN_STICK_PYTHON"], str(script), str(tmp_path / "made"), str(out)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr[-3000:]
    line = json.loads(read.stdout.splitlines()[-1])
    assert not line["unread"]
    assert not line["mistyped"]
    assert not [name for name in line["untouched"] if ".experts." in name]
    checkpoint = Checkpoint.open(tmp_path / "made")
    form, found = formats.of(checkpoint), np.load(out)
    names = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}
    layers = {key.rpartition(".")[0] for key in found}
    assert {layer.rpartition(".")[2] for layer in layers} == names.keys()
    for layer in layers:
        prefix, _, part = layer.replace("decoder.", "model.").rpartition(".")
        packed, bits, bias = (found[f"{layer}.{each}"] for each in ("weight", "scale", "bias"))
        for expert in range(len(packed)):
            made = [form.read_linear(checkpoint, f"{prefix}.{expert}.{each}") for each in names[part]]
            expected = np.concatenate([linear.dequantize().numpy().T for linear in made if linear is not None], axis=1)
            fields = np.stack((packed[expert].astype(np.int16) & 15, packed[expert] >> 4), axis=-1)
            integers = ((fields.reshape(len(expected), -1) & 15) ^ 8) - 8
            scale = bits[expert].astype(np.uint32).view(np.float32)
            values = integers * np.repeat(scale, len(integers) // len(scale), axis=0)
            np.testing.assert_array_equal(values.astype(np.float32), expected)
            np.testing.assert_allclose(bias[expert], 8 * values.sum(axis=0), rtol=1e-5, atol=1e-5)


def test_vllm_mindspore_reads_golden_stick(
    tiny_llama: Path, quantize_folder: Callable[..., Any], golden_stick: dict[str, str], tmp_path: Path
) -> None:
    made = quantize_folder(tiny_llama, tmp_path / "quantized", "golden-stick", "static")
    fused = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj": ("o_proj",)}
    fused |= {"mlp.gate_up_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",)}
    generator = torch.Generator().manual_seed(0)
    inputs, expected = {"lm_head": torch.randn(2, 64, generator=generator)}, {}
    for index in range(2):
        for name, shards in fused.items():
            prefix = f"model.layers.{index}.{name}"
            layers = [made[f"{prefix.rpartition('.')[0]}.{shard}"] for shard in shards]
            inputs[prefix] = 2 * torch.randn(33, layers[0].weight.shape[1], generator=generator)
            expected[prefix] = torch.cat([FakeQuantized(layer)(inputs[prefix]) for layer in layers], dim=-1)
    arrays: dict[str, Any] = {name: x.numpy() for name, x in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **arrays)
    command = [HERE / "vllm_mindspore_on_cpu.py", *(tmp_path / name for name in ("quantized", "inputs.npz", "out.npz"))]
    done = subprocess.run(
        [golden_stick["QTOOL_GOLDEN_STICK_PYTHON"], *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(unpacked("vllm-mindspore==0.5.1"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "out.npz")
    assert set(found) == set(expected)  # lm_head is float to it
    for name, result in expected.items():
        np.testing.assert_allclose(found[name], result.numpy(), rtol=1e-4, atol=1e-5 * float(result.abs().max()))
