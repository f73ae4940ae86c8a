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
