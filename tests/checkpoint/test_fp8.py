"""Block-scaled FP8 against torch's own conversion and against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qtool.checkpoint import fp8
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError

BLOCK = (128, 128)


def slow(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> np.ndarray:
    """One block after the other."""
    values, factors = codes.float().numpy(), scales.numpy()
    out = np.empty_like(values)
    for i in range(0, values.shape[0], block[0]):
        for j in range(0, values.shape[1], block[1]):
            tile = np.s_[i : i + block[0], j : j + block[1]]
            out[tile] = values[tile] * factors[i // block[0], j // block[1]]
    return out


def random(rows: int, columns: int, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) * 1e-3
    return codes, scales


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 300), (1, 1), (130, 5)])
@pytest.mark.parametrize("block", [BLOCK, (64, 32)])
def test_equals_a_block_after_the_other(shape: tuple[int, int], block: tuple[int, int]) -> None:
    codes, scales = random(*shape, block)
    assert np.array_equal(fp8.dequantize(codes, scales, block).numpy(), slow(codes, scales, block))


def test_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.float8_e4m3fn)
    found = fp8.dequantize(codes, torch.tensor([[0.37]]), BLOCK)
    expected = codes.float() * 0.37
    assert torch.equal(found.isnan(), expected.isnan())
    assert int(found.isnan().sum()) == 2
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def model(folder: Path, tensors: dict[str, torch.Tensor], **quantization: Any) -> Checkpoint:
    folder.mkdir()
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)} | quantization
    (folder / "config.json").write_text(json.dumps({"quantization_config": method}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (0, 128), (100, 140), (128, 256), (299, 300), (5, 5)])
def test_rows_from_anywhere(tmp_path: Path, start: int, stop: int) -> None:
    codes, scales = random(300, 200)
    floats = FloatReader(model(tmp_path / "m", {"a.weight": codes, "a.weight_scale_inv": scales}))
    expected = slow(codes, scales, BLOCK)
    assert np.array_equal(floats.rows("a.weight", start, stop).numpy(), expected[start:stop])
    with floats.holding(["a.weight"]):
        assert np.array_equal(floats.rows("a.weight", start, stop).numpy(), expected[start:stop])


def test_a_whole_tensor_is_bfloat16_and_others_stay(tmp_path: Path) -> None:
    codes, scales = random(300, 200)
    norm = torch.randn(7)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales, "norm.weight": norm}
    floats = FloatReader(model(tmp_path / "m", tensors))
    whole = floats.tensor("a.weight")
    assert whole.dtype == torch.bfloat16
    exact = torch.from_numpy(slow(codes, scales, BLOCK))
    assert torch.equal(whole, exact.to(torch.bfloat16))
    assert torch.equal(floats.tensor("a.weight", torch.float32), exact)
    assert torch.equal(floats.tensor("norm.weight"), norm)
    assert sorted(floats.names) == ["a.weight", "norm.weight"]
    few = torch.tensor([299, 5, 130])
    assert torch.equal(floats.gather("a.weight", few), whole[few])


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    codes, scales = random(300, 200)
    bad: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
        "missing": ({"a.weight": codes}, {}, "a.weight_scale_inv is missing"),
        "shape": ({"a.weight": codes, "a.weight_scale_inv": scales[:1].clone()}, {}, r"expected float \[3, 2\]"),
        "scale": (
            {"a.weight": codes, "a.weight_scale_inv": torch.full_like(scales, float("nan"))},
            {},
            "a.weight_scale_inv holds NaN",
        ),
        "code": (
            {"a.weight": torch.full((300, 200), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)}
            | {"a.weight_scale_inv": scales},
            {},
            "a.weight holds NaN",
        ),
    }
    for name, (tensors, quantization, message) in bad.items():
        floats = FloatReader(model(tmp_path / name, tensors, **quantization))
        with pytest.raises(InputError, match=message):
            floats.rows("a.weight", 0, 300)
    for quantization in ({"weight_block_size": None}, {"weight_block_size": [128, 0]}, {"fmt": "e5m2"}):
        folder = tmp_path / str(quantization)
        with pytest.raises(InputError, match="can't be read"):
            FloatReader(model(folder, {"a.weight": codes, "a.weight_scale_inv": scales}, **quantization))
