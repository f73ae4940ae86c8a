"""Weights that are finite and wrong all the same: what they make of the activations is noticed, and where."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.errors import InputError
from tests import families

GPTQ = {"activations": {"mode": "dynamic"}, "rounding": "gptq"}
NEAREST = {"activations": {"mode": "static"}, "rounding": "nearest"}


def damaged(model: Path, folder: Path, name: str, value: float) -> Path:
    """A copy whose tensor of this name has this value in one column."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][..., 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scheme(policy: dict[str, Any]) -> dict[str, Any]:
    return {"schemes": {"w8a8": [{"layers": r".*\.(lm_head|gate)|lm_head", "quantize": False}, policy]}}


@pytest.mark.parametrize("osl", ["fast", "exact"])
@pytest.mark.parametrize("policy", [GPTQ, NEAREST], ids=["gptq", "nearest"])
@pytest.mark.parametrize(
    ("weight", "value", "said"),
    [
        ("layers.1.self_attn.v_proj.weight", 5e36, r"layers\.1 are as large as \de\+3\d"),
        ("layers.1.mlp.up_proj.weight", 5e36, r"layers\.1(\.mlp\.down_proj)? are as large as \de\+3\d"),
        ("layers.0.mlp.down_proj.weight", 3e38, r"layers\.0 are (not finite|as large as \de\+3\d)"),
        ("layers.0.input_layernorm.weight", 3e38, r"layers\.0(\.self_attn\.q_proj)? are not finite"),
        ("embed_tokens.weight", 5e36, r"layers\.0 are as large as 5e\+36"),
    ],
)
def test_a_damaged_column(
    tiny_llama: Path,
    quantize: Callable[..., Any],
    tmp_path: Path,
    osl: str,
    policy: dict[str, Any],
    weight: str,
    value: float,
    said: str,
) -> None:
    model = damaged(tiny_llama, tmp_path / "model", f"model.{weight}", value)
    with pytest.raises(InputError, match=rf"activations of model\.{said}"):
        quantize(model, tmp_path / "out", scheme="w8a8", osl=osl, **scheme({"layers": ".*", **policy}))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(("part", "where"), [("up_proj", r"\.mlp\.experts\.0\.down_proj"), ("down_proj", "")])
def test_a_damaged_expert(
    tiny_tokenizer: Any, quantize: Callable[..., Any], tmp_path: Path, part: str, where: str
) -> None:
    whole = families.make(tmp_path / "whole", "qwen3_moe", tiny_tokenizer)
    model = damaged(whole, tmp_path / "model", f"model.layers.1.mlp.experts.0.{part}.weight", 5e36)
    with pytest.raises(InputError, match=rf"activations of model\.layers\.1{where} are (not finite|as large as)"):
        quantize(model, tmp_path / "out", scheme="w8a8", **scheme({"layers": ".*", **GPTQ}))


def test_what_is_large_and_sound_passes(tiny_llama: Path, quantize: Callable[..., Any], tmp_path: Path) -> None:
    model = damaged(tiny_llama, tmp_path / "model", "model.layers.0.mlp.down_proj.weight", 1e6)
    report = quantize(model, tmp_path / "out", scheme="w8a8")
    assert torch.tensor([row["relative_error"] for row in report["layers"]]).isfinite().all()
