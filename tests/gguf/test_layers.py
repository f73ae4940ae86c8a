"""What the converter is shown of a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint.reader import Checkpoint
from qtool.gguf.layers import Layers


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a16-g32"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_integers_times_scales_lie_as_the_float_model_does(
    tmp_path: Path, make_model: Callable[..., Path], run_qtool: Callable[..., Any], model_type: str, scheme: str
) -> None:
    """GPT-2 has matrices as [in, out], and llama.cpp's converter turns them round."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128} if model_type == "gpt2" else {}
    model = make_model(model_type, name=f"layers-{model_type}", **sizes)
    options = ("--samples", "2", "--seq-len", "32", "--output", tmp_path / "made")
    done = run_qtool("quantize", model, "--scheme", scheme, *options)
    assert done.code == 0, done.stderr
    layers = Layers(Checkpoint.open(tmp_path / "made"))
    original = load_file(model / "model.safetensors")
    assert {name for name in layers.names() if name not in original} <= {"lm_head.weight"}
    quantized = [name for name in layers.names() if layers.scheme(name) is not None]
    assert len(quantized) >= 8
    steps = 127 if scheme == "w8a8-dynamic" else 7
    for name in quantized:
        whole, integers, scales = layers.values(name), layers.integers(name), layers.scales(name)
        assert whole.shape == integers.shape == original[name].shape == layers.shape(name)
        assert scales.shape == layers.scales_shape(name)
        turned = (whole.t(), integers.t(), scales.t()) if model_type == "gpt2" else (whole, integers, scales)
        repeated = turned[2].repeat_interleave(turned[0].shape[1] // turned[2].shape[1], dim=1)
        assert torch.equal(turned[0], turned[1] * repeated), name
        assert int(integers.abs().max()) <= steps + 1
