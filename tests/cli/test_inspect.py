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
from qtool.scheme import W8A8, W8A8_DYNAMIC


def quantize(source: Path, output: Path, name: str) -> Path:
    """Attention static, MLP dynamic, integers of no importance."""
    checkpoint = Checkpoint.open(source)
    with CheckpointWriter(output, formats.get(name)) as writer:
        for tensor in checkpoint.names:
            layer = tensor.removesuffix(".weight")
            if layer.endswith("_proj"):
                weight = torch.ones(checkpoint.info(tensor).shape, dtype=torch.int8)
                inputs = (0.5, 3) if "self_attn" in layer else (None, None)
                scheme = W8A8 if "self_attn" in layer else W8A8_DYNAMIC
                linear = QuantizedLinear(scheme, weight, torch.ones(weight.shape[0]), None, *inputs)
                writer.add_linear(layer, linear, torch.bfloat16)
            else:
                writer.add(tensor, checkpoint.tensor(tensor))
        return writer.finish(checkpoint, checkpoint.config, {})


def test_a_float_model(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("inspect", tiny_llama, "--json")
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


def test_a_pipe_gets_text_for_people(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("inspect", tiny_llama)
    assert (done.code, done.stderr) == (0, "")
    assert "LlamaForCausalLM" in done.stdout
    assert "model.layers.*.mlp.up_proj" in done.stdout
    assert not done.stdout.startswith("{")
    listed = run_qtool("inspect", tiny_llama, "--tensors", "--filter", "lm_head")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["name", "lm_head.weight"]


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
    assert printed.err == ""
    for text in ("LlamaForCausalLM", "model.layers.*.self_attn.q_proj", "160 x 64", "100% of it"):
        assert text in printed.out


def test_weights_packed_by_another_method(tmp_path: Path, run_qtool: Callable[..., Any]) -> None:
    save_file({"a.qweight": torch.ones(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    summary = json.loads(run_qtool("inspect", tmp_path, "--json").stdout)
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


# ------------------------------------------------------------------ --tensors


def rows(done: Any) -> dict[str, dict[str, Any]]:
    assert done.code == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_every_tensor_with_its_range(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    found = rows(run_qtool("inspect", tiny_llama, "--tensors", "--json"))
    tensors = load_file(tiny_llama / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        low, high = tensor.float().min().item(), tensor.float().max().item()
        assert found[name] == {
            "name": name,
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "file": "model.safetensors",
            "min": low,
            "max": high,
            "nonfinite": 0,
        }


def test_a_filter_and_what_quantization_adds(tmp_path: Path, tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    quantize(tiny_llama, tmp_path / "m", "golden-stick")
    done = run_qtool(
        "inspect", "-", "--tensors", "--filter", r"\.0\..*(q|up)_proj", "--json", stdin=f"{tmp_path / 'm'}\n"
    )
    found = rows(done)
    prefix = "model.layers.0.self_attn.q_proj"
    parts = {name.removeprefix(f"{prefix}.") for name in found if name.startswith(prefix)}
    assert parts == {
        "weight",
        "weight_scale",
        "weight_offset",
        "input_scale",
        "input_offset",
        "deq_scale",
        "quant_bias",
    }
    weight = found[f"{prefix}.weight"]
    assert (weight["dtype"], weight["min"], weight["max"], weight["scheme"]) == ("I8", 1, 1, "W8A8 static")
    assert (weight["scale_min"], weight["scale_max"]) == (1, 1)
    assert found[f"{prefix}.quant_bias"]["min"] == -3 * 64
    assert found["model.layers.0.mlp.up_proj.weight"]["scheme"] == "W8A8 dynamic"
    assert all("q_proj" in name or "up_proj" in name for name in found)
    assert not any(".1." in name for name in found)


def test_numbers_of_every_kind(tmp_path: Path, run_qtool: Callable[..., Any], monkeypatch: Any) -> None:
    tensors = {
        "nan": torch.tensor([1.0, float("nan"), -2.0, float("inf"), float("-inf")]),
        "nothing": torch.tensor([float("nan")]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "large": torch.tensor([2**62, -(2**62)]),
        "bool": torch.tensor([True, False]),
        "unsigned": torch.tensor([0, 65535], dtype=torch.uint16),
        "eight": torch.tensor([448.0, -0.5]).to(torch.float8_e4m3fn),
        "half": torch.tensor([65504.0, -1.0]).half(),
        "double": torch.tensor([1e300, -1e-300], dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = rows(run_qtool("inspect", tmp_path, "--tensors", "--json"))
    ranges = {name: (row["min"], row["max"], row["nonfinite"]) for name, row in found.items()}
    assert ranges == {
        "nan": (-2.0, 1.0, 3),
        "nothing": (None, None, 1),
        "empty": (None, None, 0),
        "scalar": (7, 7, 0),
        "large": (-(2**62), 2**62, 0),
        "bool": (0, 1, 0),
        "unsigned": (0, 65535, 0),
        "eight": (-0.5, 448.0, 0),
        "half": (-1.0, 65504.0, 0),
        "double": (-1e-300, 1e300, 0),
    }
    from qtool.checkpoint import ranges as module

    monkeypatch.setattr(module, "_CHUNK", 16)  # a tensor in several pieces
    checkpoint = Checkpoint.open(tmp_path)
    for name, (low, high, nonfinite) in ranges.items():
        assert module.measure(checkpoint, name) == {"min": low, "max": high, "nonfinite": nonfinite}


def test_a_terminal_gets_a_line_for_each(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from qtool.cli.inspect import inspect

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    inspect(str(tiny_llama), tensors=True, filter="lm_head|final|model.norm", json=False)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["name", "dtype", "shape", "bytes", "min", "max", "scheme", "scales"]
    assert [line.split()[:2] for line in lines] == [["lm_head.weight", "BF16"], ["model.norm.weight", "BF16"]]
    assert "512 x 64" in lines[0]


def test_names_cannot_play_tricks_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from qtool.cli.inspect import inspect

    save_file({"\x1b]0;evil\x07": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    inspect(str(tmp_path), tensors=True)
    assert "\x1b" not in capsys.readouterr().out


def test_wrong_usage_of_tensors(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    for options, message in (
        (["--filter", "x"], "goes with --tensors"),
        (["--tensors", "--filter", "("], "not a regular expression"),
    ):
        done = run_qtool("inspect", tiny_llama, *options)
        assert (done.code, done.stdout) == (2, "")
        assert message in done.stderr


def test_a_checkpoint_larger_than_memory_may_be(tmp_path: Path, qtool_environment: dict[str, str]) -> None:
    """The worker never holds a tensor: a sparse one of 8 GB takes no more than the chunks that are read."""
    import subprocess
    import sys

    size = 8 << 30
    header = json.dumps({"big": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from qtool.checkpoint import ranges; from qtool.checkpoint.reader import Checkpoint\n"
        "import resource, itertools\n"
        "chunks = Checkpoint.open(sys.argv[1]).chunks('big', ranges._CHUNK)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for chunk in itertools.islice(chunks, 12): ranges._finite(chunk)[0].aminmax()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=qtool_environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 600_000  # kilobytes, torch's first use included
