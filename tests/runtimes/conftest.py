"""Checkpoints that the runtimes must run, and what each runtime makes of them (one start of each per checkpoint)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPTS = ["The import statement", "If the", "A class definition is an executable", "x = 1"]
MAX_TOKENS = 24


def quantize_by_hand(source: Path, target: Path) -> Path:
    """A compressed-tensors int8 checkpoint: attention static asymmetric per tensor, MLP dynamic per token."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        if "self_attn" in name:
            layer = name.removesuffix(".weight")
            spread = 16.0 if "o_proj" in name else 60.0
            tensors[f"{layer}.input_scale"] = torch.tensor([spread / 255], dtype=torch.bfloat16)
            tensors[f"{layer}.input_zero_point"] = torch.tensor([-3], dtype=torch.int8)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    static = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*proj$"], "weights": weights, "input_activations": static},
            "group_1": {"targets": ["re:.*mlp.*proj$"], "weights": weights, "input_activations": dynamic},
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="session")
def tiny_int8(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_by_hand(tiny_llama, tmp_path_factory.mktemp("int8") / "tiny-llama-int8")


@pytest.fixture(scope="session")
def answers(tiny_llama: Path, tiny_int8: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """answers(runtime, "float" | "int8") -> greedy answers to PROMPTS, with the gaps."""
    from qtool import runtimes

    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def ask(runtime: str, kind: str) -> list[dict[str, Any]]:
        if (runtime, kind) not in known:
            model = tiny_llama if kind == "float" else tiny_int8
            known[runtime, kind] = runtimes.generate(model, PROMPTS, max_tokens=MAX_TOKENS, runtime=runtime, gaps=True)
        return known[runtime, kind]

    return ask
