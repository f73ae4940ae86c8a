"""Rounded layers, and whole models made of them, for the tests of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import CheckpointWriter
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W8A8, W8A8_DYNAMIC

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def round_layer(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    inputs: tuple[float, int] | None = None,
    scale_of: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> QuantizedLinear:
    """Plain rounding; `inputs` is a static scale and offset."""
    scale = scale_of(weight.float().abs().amax(1).clamp(min=1e-6) / 127)
    integers = (weight.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
    return QuantizedLinear(W8A8 if inputs else W8A8_DYNAMIC, integers, scale, bias, *(inputs or (None, None)))


@pytest.fixture
def random_layer() -> Callable[..., QuantizedLinear]:
    """random_layer(out, in, static=, bias=, seed=) -> a layer whose scales are no round numbers."""

    def make(
        out: int = 12, in_: int = 20, *, static: bool = True, bias: bool = False, seed: int = 0
    ) -> QuantizedLinear:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out, in_, generator=generator) * 0.05
        bias_values = torch.randn(out, generator=generator).bfloat16() if bias else None
        return round_layer(weight, bias_values, (0.0123456, -37) if static else None)

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder({file: bytes or JSON value}) -> a folder with those files, and a config.json unless given."""

    def make(files: dict[str, Any], name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in ({"config.json": {"architectures": ["LlamaForCausalLM"]}} | files).items():
            if content is not None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                (folder / file).write_bytes(data)
        return folder

    return make


@pytest.fixture
def quantize_folder() -> Callable[..., dict[str, QuantizedLinear]]:
    """quantize_folder(source, output, format, mode) -> the layers: attention is static where `mode` is "mixed"."""

    def quantize(source: Path, output: Path, name: str, mode: str, **options: Any) -> dict[str, QuantizedLinear]:
        checkpoint, form = Checkpoint.open(source), formats.get(name)
        dtype = getattr(torch, str(checkpoint.config["dtype"]))
        made: dict[str, QuantizedLinear] = {}
        with CheckpointWriter(output, form, **options) as writer:
            for tensor in checkpoint.names:
                layer = tensor.removesuffix(".weight")
                if layer.endswith(LINEARS) and layer != tensor:
                    static = mode == "static" or (mode == "mixed" and "self_attn" in layer)
                    bias = f"{layer}.bias"
                    storable = partial(form.storable_weight_scale, scheme=W8A8 if static else W8A8_DYNAMIC, dtype=dtype)
                    made[layer] = round_layer(
                        checkpoint.tensor(tensor),
                        checkpoint.tensor(bias) if bias in checkpoint else None,
                        (form.storable_scale(0.05, dtype), 11) if static else None,
                        storable,
                    )
                    writer.add_linear(layer, made[layer], dtype)
                elif not tensor.removesuffix(".bias").endswith(LINEARS):
                    writer.add(tensor, checkpoint.tensor(tensor))
            writer.finish(checkpoint, checkpoint.config, {"made_by": "a test"})
        return made

    return quantize
