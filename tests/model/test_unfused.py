"""Experts of one tensor read one by one, against slices made in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.model.architectures import FusedExperts
from qtool.model.unfused import Slice, Unfused, expert_names, stem_of

COUNT, HIDDEN, WIDTH = 3, 8, 5


def _fused(**changes: Any) -> FusedExperts:
    settings = {"has_gate": True, "has_bias": False, "transposed": False, "interleaved": False, **changes}
    return FusedExperts(
        name="mlp.experts",
        gate_up="gate_up_proj",
        down="down_proj",
        count=COUNT,
        hidden=HIDDEN,
        intermediate=WIDTH,
        apply_gate=torch.relu,
        router=None,
        **settings,
    )


@pytest.fixture
def inner(tmp_path: Path) -> FloatReader:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "experts.gate_up_proj": torch.randn(COUNT, HIDDEN, 2 * WIDTH, generator=generator),
        "experts.gate_up_proj_bias": torch.randn(COUNT, 2 * WIDTH, generator=generator).bfloat16(),
        "norm.weight": torch.ones(HIDDEN),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "any"}')
    return FloatReader(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("rows", [slice(0, WIDTH), slice(WIDTH, None), slice(0, None, 2), slice(1, None, 2)])
def test_a_matrix_is_its_part_of_the_tensor(inner: FloatReader, rows: slice) -> None:
    stored = load_file(Path(inner.where) / "model.safetensors")
    slices = {
        "experts.1.up_proj.weight": Slice("experts.gate_up_proj", 1, rows, True),
        "experts.1.up_proj.bias": Slice("experts.gate_up_proj_bias", 1, rows, False),
    }
    weights = Unfused(inner, slices)
    expected = stored["experts.gate_up_proj"].numpy()[1].T[rows]
    name = "experts.1.up_proj.weight"
    assert weights.shape(name) == expected.shape
    assert weights.nbytes(name) == expected.nbytes
    np.testing.assert_array_equal(weights.tensor(name).numpy(), expected)
    np.testing.assert_array_equal(weights.rows(name, 1, 4).numpy(), expected[1:4])
    np.testing.assert_array_equal(weights.gather(name, torch.tensor([2, 0])).numpy(), expected[[2, 0]])
    bias = weights.unchanged("experts.1.up_proj.bias")
    assert bias.dtype == torch.bfloat16
    assert torch.equal(bias, stored["experts.gate_up_proj_bias"][1][rows])


def test_fused_tensors_give_way_to_the_experts(inner: FloatReader) -> None:
    weights = Unfused(inner, {"experts.0.up_proj.weight": Slice("experts.gate_up_proj", 0, slice(0, 5), True)})
    assert "experts.gate_up_proj" not in weights
    assert "experts.gate_up_proj" not in weights.names
    assert set(weights.names) == {"experts.0.up_proj.weight", "experts.gate_up_proj_bias", "norm.weight"}
    assert torch.equal(weights.tensor("norm.weight"), torch.ones(HIDDEN))


@pytest.mark.parametrize(
    ("stored", "stem"),
    [
        ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts"),
        ("model.layers.3.block_sparse_moe.output_linear.weight", "model.layers.3.block_sparse_moe.experts"),
    ],
)
def test_experts_are_named_beside_their_tensor(stored: str, stem: str) -> None:
    assert stem_of(stored) == stem
    assert [*expert_names(stem, _fused(has_gate=False))[1]] == [f"{stem}.1.up_proj", f"{stem}.1.down_proj"]
    assert next(iter(expert_names(stem, _fused())[2])) == f"{stem}.2.gate_proj"
