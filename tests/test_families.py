"""The makers of test models, checked by transformers and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import families

MIXTURES = [name for name, config in families.FAMILIES.items() if families.routed(config)]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_transformers_finds_every_tensor_and_writes_the_same_names(
    model_type: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    folder = families.make(tmp_path / "made", model_type, tiny_tokenizer, shards=3)
    assert len(list(folder.glob("*.safetensors"))) == 3
    model, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["mismatched_keys"]
    model.save_pretrained(tmp_path / "again")
    ours, again = families.load(folder), families.load(tmp_path / "again")
    further = {name for name in ours if name.startswith("model.layers.2.")}
    assert again.keys() == ours.keys() - further
    assert all(torch.equal(tensor.float(), ours[name].float()) for name, tensor in again.items())
    assert bool(further) == ("num_nextn_predict_layers" in families.FAMILIES[model_type])


def test_codes_of_fp8_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(families.E4M3, codes.view(torch.float8_e4m3fn).float().numpy())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "mixtral"])
def test_fp8_is_near_the_float_model(model_type: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = families.make(tmp_path / "float", model_type, tiny_tokenizer, dtype=torch.float32)
    folder = families.to_fp8(source, tmp_path / "fp8", shards=2)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    stored, before = families.load(folder), families.load(source)
    after = families.load(families.from_fp8(folder, tmp_path / "back"))
    assert after.keys() == before.keys()
    edges = set()
    for name, tensor in before.items():
        if not families.is_fp8(name):
            assert torch.equal(stored[name], tensor)
            assert torch.equal(after[name], tensor)
            continue
        assert stored[name].dtype == torch.float8_e4m3fn
        assert stored[f"{name}_scale_inv"].shape == tuple(-(-size // 128) for size in tensor.shape)
        edges |= {size % 128 for size in tensor.shape}
        # 3 bits of mantissa: half a step of 2^-3; what is below 2^-6 of the largest code's 448 errs by half 2^-9
        steps = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        allowed = tensor.abs() * 2**-4 + steps[: tensor.shape[0], : tensor.shape[1]] * 2**-10
        assert ((after[name] - tensor).abs() <= allowed * 1.001).all(), name
    assert edges - {0}
