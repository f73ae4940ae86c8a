"""Int4 experts of DeepSeek-V3 by mindspore-gs itself, on this CPU, beside the native engine's GPTQ and the same files.

mindspore-gs 1.4.1 takes the scales of static groups from channels that are in order of energy, and stores them as those
of the model's own groups (linear_gptq_quant_wrappers.py, _apply_gptq). Where a channel has one group, that is the same.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.quant.rounding.gptq import GPTQ
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W4A8
from tests import families
from tests.managed import unpacked

SIZE, WIDTHS = 128, {"linear_fc1": 256, "linear_fc2": 128}  # two groups, and one
PARTS = {"gate_proj": "linear_fc1", "up_proj": "linear_fc1", "down_proj": "linear_fc2"}
SCRIPT = Path(__file__).with_name("golden_stick_a8w4.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    sizes: dict[str, Any] = {"hidden_size": WIDTHS["linear_fc1"], "moe_intermediate_size": WIDTHS["linear_fc2"]}
    folder = tmp_path_factory.mktemp("a8w4") / "float"
    return families.make(folder, "deepseek_v3", tiny_tokenizer, num_nextn_predict_layers=0, **sizes)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """What enters the experts, [tokens, in]: channels of unlike energies, and correlated."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part, width in WIDTHS.items():
        mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
        x = torch.randn(400, width, generator=generator) @ mixing
        found[part] = x * torch.randn(width, generator=generator).exp()
    return found


@pytest.fixture(scope="module")
def made(source: Path, inputs: dict[str, torch.Tensor], golden_stick: dict[str, str]) -> Path:
    """What mindspore-gs writes."""
    output = source.with_name("made")
    arrays: dict[str, Any] = {part: x.numpy() for part, x in inputs.items()}
    np.savez(source.with_name("inputs.npz"), **arrays)
    path = os.pathsep.join(str(unpacked(each)) for each in ("mindformers==1.7.0", "vllm-mindspore==0.5.1"))
    arguments = (source, source.with_name("inputs.npz"), output, SIZE)
    done = subprocess.run(
        [golden_stick["QTOOL_GOLDEN_STICK_PYTHON"], str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "GLOG_v": "3"},
        cwd=source.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def experts(source: Path) -> dict[str, torch.Tensor]:
    """The float weights of some routed experts, by their names."""
    tensors = load_file(source / "model.safetensors")
    return {
        name.removesuffix(".weight"): weight.float()
        for name, weight in tensors.items()
        if any(f".experts.{expert}." in name for expert in (0, 5))
    }


def scale_of(weight: torch.Tensor) -> torch.Tensor:
    """float32 [out, groups], a symmetric range in 15 steps."""
    peak = weight.view(len(weight), -1, SIZE).abs().amax(dim=2)
    return (peak.double() * 2 / 15).float()


def gptq(weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """With mindspore-gs's damping: 1 % of the mean of the diagonal."""
    hessian = x.t() @ x / len(x)
    return GPTQ(hessian, 0.01 * hessian.diagonal().mean(), W4A8.weights).round(weight, scale)


def relative(weight: torch.Tensor, found: torch.Tensor, x: torch.Tensor) -> float:
    return float(((found - weight) @ x.t()).square().sum() / (weight @ x.t()).square().sum())


def test_the_same_tensors_are_written(source: Path, made: Path, inputs: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and packing; and of channels with one group the same scales, and integers but for ties."""
    theirs, form = load_file(made / "rank_0" / "quant.safetensors"), formats.get("golden-stick")
    types = json.loads((made / "quantization_description.json").read_text())
    for name, weight in experts(source).items():
        x, scale = inputs[PARTS[name.rpartition(".")[2]]], scale_of(weight)
        linear = QuantizedLinear(W4A8, gptq(weight, x, scale), scale)
        ours = form.tensors(name, linear, torch.bfloat16)
        own = {key: tensor for key, tensor in theirs.items() if key.startswith(f"{name}.")}
        offset = own.pop(f"{name}.weight_offset")  # zeros, which no reader of golden-stick asks for
        assert not offset.any()
        assert {key: (t.dtype, t.shape) for key, t in own.items()} == {k: (t.dtype, t.shape) for k, t in ours.items()}
        described = form.describe(list(ours), {name: W4A8}, {}).files["quantization_description.json"]
        assert {key: types[key] for key in own} == {key: described[key] for key in ours}
        if weight.shape[1] == SIZE:
            assert torch.equal(*(each[f"{name}.weight_scale"].view(torch.int64) for each in (own, ours)))
            fields = [(each[f"{name}.weight"] & 15, each[f"{name}.weight"] >> 4) for each in (own, ours)]
            same = [float((a == b).float().mean()) for a, b in zip(*fields, strict=True)]
            assert min(same) > 0.99
    assert "group_size" not in types  # which MindFormers asks for: a8dynw4.py raises ValueError without


def test_its_groups_are_those_of_other_channels(source: Path, made: Path, inputs: dict[str, torch.Tensor]) -> None:
    """So its layers are less exact than rounded to nearest, and the native engine's are more so."""
    checkpoint, form = Checkpoint.open(checkpoint_of(source, made)), formats.get("golden-stick")
    for name, weight in experts(source).items():
        x = inputs[PARTS[name.rpartition(".")[2]]]
        theirs = form.read_linear(checkpoint, name)
        assert theirs is not None
        order = torch.argsort(x.square().sum(0), descending=True)
        torch.testing.assert_close(theirs.weight_scale, scale_of(weight[:, order]), rtol=1e-6, atol=0)
        scale = scale_of(weight)
        wide = scale.repeat_interleave(SIZE, dim=1)
        nearest = (weight / wide).round().clamp(-8, 7) * wide
        errors = [relative(weight, each, x) for each in (gptq(weight, x, scale) * wide, nearest, theirs.dequantize())]
        if weight.shape[1] > SIZE:
            assert errors[0] < errors[1] < errors[2], (name, errors)
        else:
            assert errors[0] == pytest.approx(errors[2], rel=0.02)


def checkpoint_of(source: Path, made: Path) -> Path:
    """The folder that vLLM-MindSpore would be given."""
    folder = made.with_name("checkpoint")
    folder.mkdir(exist_ok=True)
    for file in (made / "rank_0" / "quant.safetensors", made / "quantization_description.json", source / "config.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_what_it_wrote_is_read(source: Path, made: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """Without a group_size in the description: the scales' own shape says it."""
    folder = checkpoint_of(source, made)
    done = run_qtool("convert", folder, "--to", "compressed-tensors", "--output", tmp_path / "other", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == {"W4A8 dynamic in groups of 128": 24}
    old, new = Checkpoint.open(folder), Checkpoint.open(tmp_path / "other")
    for name in experts(source):
        linears = [formats.of(each).read_linear(each, name) for each in (old, new)]
        assert torch.equal(*(linear.dequantize() for linear in linears if linear is not None))
