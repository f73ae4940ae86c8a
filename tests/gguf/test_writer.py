"""GGUF files of quantized models: the integers in them, and llama.cpp's answers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from qtool import runtimes, workers
from qtool.checkpoint.reader import Checkpoint
from qtool.cli.convert import GGUF
from qtool.conversion import to_gguf
from qtool.environments import machine
from qtool.errors import InputError
from qtool.quant.types import QuantizedLinear
from qtool.workers import Event
from tests.checkpoint import conftest
from tests.cli.test_convert import LAYERS
from tests.managed import managed_python

pytestmark = pytest.mark.peers

Quantize = Callable[..., dict[str, QuantizedLinear]]
LINEARS = {name: ours for name, ours in LAYERS.items() if "norm" not in name}


@pytest.fixture(autouse=True)
def llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QTOOL_LLAMA_CPP_PYTHON", managed_python("llama-cpp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def with_pieces(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """make_model, and a tokenizer.model, since llama.cpp knows only tokenizers of published models by their hash."""

    def make(model_type: str, **config: object) -> Path:
        folder = make_model(model_type, name=f"gguf-{model_type}", **config)
        trained = io.BytesIO()
        words = (" ".join(f"{word}{number}" for number in range(40)) for word in ("today", "am", "llama", "is"))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words, model_writer=trained, vocab_size=120, hard_vocab_limit=False, minloglevel=2
        )
        (folder / "tokenizer.model").write_bytes(trained.getvalue())
        return folder

    return make


def tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def blocks(tensor: gguf.ReaderTensor) -> tuple[np.ndarray, np.ndarray]:
    """Integers [rows, columns] and scales [rows] of a Q8_0 tensor whose rows have one scale each."""
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
    parts = rows.reshape(len(rows), -1, 34)
    scales = parts[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    assert (scales == scales[:, :1]).all()
    return parts[..., 2:].view(np.int8).reshape(len(rows), -1), scales[:, 0]


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The halves of each rotary head, row by row in turn, as llama.cpp wants them of a Llama."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def test_a_llama_keeps_its_integers(
    tmp_path: Path, with_pieces: Callable[..., Path], quantize_folder: Quantize
) -> None:
    model, source = with_pieces("llama"), tmp_path / "source"
    made = quantize_folder(model, source, "compressed-tensors", "dynamic")
    result = to_gguf(source, tmp_path / "model.gguf", overwrite=False, on_event=lambda event: None)
    assert result["integers"] == sum(layer.weight.numel() for layer in made.values())
    assert (result["to"], result["rounded"]) == (GGUF, [])
    written = tensors(tmp_path / "model.gguf")
    for name, ours in LINEARS.items():
        for layer in range(2):
            linear = made[f"model.layers.{layer}.{ours}"]
            heads = {"attn_q": 4, "attn_k": 2}.get(name)
            weight, scale = linear.weight, linear.weight_scale
            if heads:
                weight, scale = interleaved(weight, heads), interleaved(scale, heads)
            integers, scales = blocks(written[f"blk.{layer}.{name}.weight"])
            assert np.array_equal(integers, weight.numpy()), name
            assert np.array_equal(scales, scale.half().float().numpy()), name
    assert written["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2}
EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}


def test_stacked_experts_keep_their_integers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_pieces: Callable[..., Path], quantize_folder: Quantize
) -> None:
    monkeypatch.setattr(conftest, "LINEARS", (*conftest.LINEARS, *EXPERTS.values()))
    made = quantize_folder(with_pieces("mixtral", **MIXTRAL), tmp_path / "source", "compressed-tensors", "dynamic")
    result = to_gguf(tmp_path / "source", tmp_path / "model.gguf", overwrite=False, on_event=lambda event: None)
    assert result["integers"] == sum(layer.weight.numel() for layer in made.values())
    written = tensors(tmp_path / "model.gguf")
    for name, ours in EXPERTS.items():
        stacked = torch.cat([made[f"model.layers.1.block_sparse_moe.experts.{i}.{ours}"].weight for i in range(3)])
        integers, _ = blocks(written[f"blk.1.{name}.weight"])
        assert np.array_equal(integers, stacked.numpy()), name


def test_what_is_rounded_anew_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_pieces: Callable[..., Path], quantize_folder: Quantize
) -> None:
    """Here one expert is float, and llama.cpp has all of a layer in one tensor."""
    some = [f"experts.{i}.{ours}" for i in range(3) for ours in EXPERTS.values() if (i, ours) != (0, "w1")]
    monkeypatch.setattr(conftest, "LINEARS", tuple(some))
    model = with_pieces("mixtral", **MIXTRAL)
    quantize_folder(model, tmp_path / "source", "compressed-tensors", "dynamic")
    heard: list[Event] = []
    result = to_gguf(tmp_path / "source", tmp_path / "model.gguf", overwrite=False, on_event=heard.append)
    rounded = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in EXPERTS]
    assert sorted(result["rounded"]) == sorted(rounded)
    assert result["integers"] == 0
    (warning,) = [event["message"] for event in heard if event["event"] == "warning"]
    assert "and 3 more: rounded anew" in warning
    stored = tensors(tmp_path / "model.gguf")[rounded[0]]
    values = load_file(model / "model.safetensors")["model.layers.0.block_sparse_moe.experts.0.w1.weight"].float()
    read = gguf.quants.dequantize(np.asarray(stored.data[0]), gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(read - values.numpy()).max() <= float(values.abs().max()) / 127


def test_llama_cpp_answers_as_transformers_does(
    tmp_path: Path,
    with_pieces: Callable[..., Path],
    quantize_folder: Quantize,
) -> None:
    """Where the reference is decided: llama.cpp rounds activations in another way, and random models are near ties."""
    model = with_pieces("llama", seed=3)
    quantize_folder(model, tmp_path / "source", "compressed-tensors", "dynamic")
    prompts = [[int(i) for i in np.random.default_rng(seed).integers(3, 120, 12)] for seed in range(12)]
    reference = runtimes.generate(tmp_path / "source", prompts, runtime="transformers", max_tokens=1, gaps=True)
    answers = runtimes.generate(tmp_path / "source", prompts, runtime="llama-cpp", max_tokens=1, gaps=True)
    decided = [i for i, answer in enumerate(reference) if answer["gaps"][0] > 0.5]
    assert len(decided) >= 3
    for i in decided:
        assert answers[i]["token_ids"] == reference[i]["token_ids"]
        assert answers[i]["gaps"][0] == pytest.approx(reference[i]["gaps"][0], abs=0.4)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_an_input_error(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp's converter can't convert this model"):
        to_gguf(tiny_llama, tmp_path / "model.gguf", overwrite=False, on_event=lambda event: None)
    assert list(tmp_path.glob("*model.gguf*")) == []


def test_auto_takes_what_it_can_and_leaves_the_rest_to_vllm(
    tmp_path: Path,
    with_pieces: Callable[..., Path],
    quantize_folder: Quantize,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)

    def preferred(model: Path) -> tuple[str, str | None]:
        found = runtimes.prefer("auto", Checkpoint.open(model), runtimes.Prompting(1), lambda event: None)
        return found.launch.name, found.why

    quantize_folder(with_pieces("llama"), tmp_path / "source", "compressed-tensors", "dynamic")
    assert preferred(tmp_path / "source")[0] == "llama-cpp"
    (made,) = (tmp_path / "cache").rglob("*.gguf")
    assert gguf.GGMLQuantizationType.Q8_0 in {tensor.tensor_type for tensor in tensors(made).values()}
    first = preferred(tiny_llama)
    assert first[0] == "vllm"
    assert "converter can't convert this model" in (first[1] or "")
    monkeypatch.setattr(workers, "run", None)  # what it can't take is known without another try
    assert preferred(tiny_llama) == first
