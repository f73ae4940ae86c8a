"""gpt-oss as it is published, with experts in MXFP4, against transformers' own dequantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError

EXPERTS = "model.layers.0.mlp.experts"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _codes(experts: int, out: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 125, (experts, out, width // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model with FP4 experts, the same as transformers reads it: bfloat16)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = make_model("gpt_oss", name="mxfp4-gpt-oss", **SIZES)
    folder = tmp_path_factory.mktemp("mxfp4")
    packed, plain = shutil.copytree(made, folder / "packed"), shutil.copytree(made, folder / "plain")
    tensors = load_file(made / "model.safetensors")
    coded = dict(tensors)
    for index in range(2):
        for seed, (name, out) in enumerate((("gate_up_proj", 128), ("down_proj", 64))):
            full = f"model.layers.{index}.mlp.experts.{name}"
            blocks, scales = _codes(4, out, 64, 2 * index + seed)
            tensors[full] = convert_moe_packed_tensors(blocks, scales).contiguous()
            del coded[full]
            coded |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(coded, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def test_the_numbers_are_those_of_transformers(pair: tuple[Path, Path]) -> None:
    wanted = load_file(pair[1] / "model.safetensors")
    reader = FloatReader(Checkpoint.open(pair[0]), as_float=True)
    assert sorted(reader.names) == sorted(wanted)
    for name, tensor in wanted.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.nbytes(name) == tensor.nbytes
        assert torch.equal(reader.tensor(name), tensor)
        assert torch.equal(reader.unchanged(name), tensor)
    down = f"{EXPERTS}.down_proj"
    with reader.holding([down]):
        assert torch.equal(reader.rows(down, 1, 3), wanted[down][1:3].float())


def test_it_is_quantized_like_its_floats(
    pair: tuple[Path, Path], run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    results = []
    for source in pair:
        output = tmp_path / source.name
        options = ("--scheme", "w8a8-dynamic", "--samples", "2", "--seq-len", "32", "-o", output)
        done = run_qtool("quantize", source, *options)
        assert done.code == 0, done.stderr
        assert ("the source is quantized already (mxfp4)" in done.stderr) == (source is pair[0])
        results.append(load_file(output / "model.safetensors"))
    packed, plain = results
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)
    assert packed[f"{EXPERTS}.0.gate_proj.weight"].dtype == torch.int8
    config = json.loads((tmp_path / pair[0].name / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_scales_that_do_not_fit_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{EXPERTS}.down_proj_scales"] = tensors[f"{EXPERTS}.down_proj_scales"][:, :32].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reader = FloatReader(Checkpoint.open(folder), as_float=True)
    with pytest.raises(InputError, match=r"down_proj: blocks .* and scales .* don't fit MXFP4"):
        reader.tensor(f"{EXPERTS}.down_proj")
