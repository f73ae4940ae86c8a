"""qtool inspect, run as a user would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import summarize
from qtool.checkpoint.writer import CheckpointWriter
from qtool.quant.types import QuantizedLinear


def quantize(source: Path, output: Path, name: str) -> Path:
    """Attention static, MLP dynamic, integers of no importance."""
    checkpoint = Checkpoint.open(source)
    with CheckpointWriter(output, formats.get(name)) as writer:
        for tensor in checkpoint.names:
            layer = tensor.removesuffix(".weight")
            if layer.endswith("_proj"):
                weight = torch.ones(checkpoint.info(tensor).shape, dtype=torch.int8)
                inputs = (0.5, 3) if "self_attn" in layer else (None, None)
                linear = QuantizedLinear(weight, torch.ones(weight.shape[0]), None, *inputs)
                writer.add_linear(layer, linear, torch.bfloat16)
            else:
                writer.add(tensor, checkpoint.tensor(tensor))
        return writer.finish(checkpoint, checkpoint.config, {})


def test_a_float_model(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("inspect", tiny_llama)
    assert done.code == 0
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    tensors = load_file(tiny_llama / "model.safetensors")
    assert summary["architecture"] == "LlamaForCausalLM"
    assert summary["model_type"] == "llama"
    assert summary["format"] == "float"
    assert summary["dtype"] == "BF16"
    assert summary["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert summary["bytes"] == summary["bytes_bf16"] == 2 * summary["parameters"]
    assert summary["bytes_on_disk"] == (tiny_llama / "model.safetensors").stat().st_size
    assert {"layers": "model.layers.*.mlp.up_proj", "count": 2, "scheme": "BF16", "shape": [160, 64]} in summary[
        "layers"
    ]


@pytest.mark.parametrize("name", formats.NAMES)
def test_a_quantized_model_has_the_parameters_of_its_original(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    summary = summarize(Checkpoint.open(quantize(tiny_llama, tmp_path / "m", name)))
    tensors = load_file(tiny_llama / "model.safetensors")
    assert summary["format"] == name
    assert summary["dtype"] == "BF16"
    assert summary["parameters"] == sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert summary["bytes"] < summary["bytes_bf16"]
    schemes = {group["layers"]: (group["count"], group["scheme"]) for group in summary["layers"]}
    assert schemes["model.layers.*.self_attn.q_proj"] == (2, "W8A8 static")
    assert schemes["model.layers.*.mlp.down_proj"] == (2, "W8A8 dynamic")
    assert schemes["lm_head"] == (1, "BF16")


def test_the_path_comes_from_a_pipe(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    piped = run_qtool("inspect", "-", "--json", stdin=f"{tiny_llama}\n")
    assert piped.code == 0
    assert piped.stdout == run_qtool("inspect", tiny_llama, "--json").stdout


def test_a_terminal_gets_tables(tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from qtool.cli.inspect import inspect

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    inspect(str(tiny_llama))
    printed = capsys.readouterr()
    assert printed.out == ""
    for text in ("LlamaForCausalLM", "model.layers.*.self_attn.q_proj", "160 x 64", "100% of it"):
        assert text in printed.err


def test_weights_packed_by_another_method(tmp_path: Path, run_qtool: Callable[..., Any]) -> None:
    save_file({"a.qweight": torch.ones(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    summary = json.loads(run_qtool("inspect", tmp_path).stdout)
    assert summary["format"] == "gptq"
    assert summary["parameters"] is None
    assert summary["architecture"] is None


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such folder"), (b"", "no config.json"), (b"{}", "no safetensors")]
)
def test_bad_input(tmp_path: Path, run_qtool: Callable[..., Any], content: bytes | None, message: str) -> None:
    folder = tmp_path / "m"
    if content is not None:
        folder.mkdir()
        (folder / ("config.json" if content else "other")).write_bytes(content)
    done = run_qtool("inspect", folder)
    assert done.code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert str(folder) in done.stderr
    assert "Traceback" not in done.stderr
