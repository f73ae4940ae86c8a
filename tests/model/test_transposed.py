"""GPT-2's Conv1D: matrices that lie in the files as [in, out], from the source to the quantized model and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint

LAYER = "transformer.h.0.attn.c_proj"  # square: a shape doesn't tell which way it lies
WIDE = "transformer.h.0.mlp.c_fc"


@pytest.fixture(scope="module")
def gpt2(make_model: Callable[..., Path]) -> Path:
    return make_model("gpt2", name="transposed-gpt2", n_embd=64, n_layer=2, n_head=4)


@pytest.fixture(scope="module")
def int8(gpt2: Path, run_qtool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("transposed") / "int8"
    options = ("--scheme", "w8a8-dynamic", "--samples", "2", "--seq-len", "32", "-o", output)
    done = run_qtool("quantize", gpt2, *options)
    assert done.code == 0, done.stderr
    return output


def test_a_matrix_is_read_as_out_in(gpt2: Path) -> None:
    stored, reader = load_file(gpt2 / "model.safetensors"), FloatReader(Checkpoint.open(gpt2))
    for layer in (LAYER, WIDE):
        name = f"{layer}.weight"
        wanted = stored[name].T
        assert reader.shape(name) == tuple(wanted.shape)
        assert torch.equal(reader.tensor(name), wanted)
        assert torch.equal(reader.rows(name, 3, 9), wanted[3:9].float())
        assert torch.equal(reader.unchanged(name), stored[name])
        with reader.holding([name]):
            assert torch.equal(reader.rows(name, 3, 9), wanted[3:9].float())
    embedding = "transformer.wte.weight"
    assert torch.equal(reader.tensor(embedding), stored[embedding])


def test_int8_lies_as_vllm_transposes_it(gpt2: Path, int8: Path) -> None:
    before, after = load_file(gpt2 / "model.safetensors"), load_file(int8 / "model.safetensors")
    quantized = {name for name, tensor in after.items() if tensor.dtype == torch.int8}
    assert quantized == {
        f"transformer.h.{index}.{part}.weight"
        for index in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert all(after[name].shape == before[name].shape for name in quantized)
    assert all(after[f"{name}_scale"].shape == (before[name].shape[1], 1) for name in quantized)
    checkpoint = Checkpoint.open(int8)
    for layer in (LAYER, WIDE):
        linear = formats.of(checkpoint).read_linear(checkpoint, layer)
        assert linear is not None
        assert torch.equal(linear.weight, after[f"{layer}.weight"].T)


def test_the_result_computes_what_the_model_does(gpt2: Path, int8: Path) -> None:
    from transformers import AutoModelForCausalLM

    after, checkpoint = load_file(int8 / "model.safetensors"), Checkpoint.open(int8)
    model = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32).eval()
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        for name, module in model.named_modules():
            if type(module).__name__ == "Conv1D":
                linear = formats.of(checkpoint).read_linear(checkpoint, name)
                assert linear is not None
                module.weight.copy_(linear.dequantize().T)
            for part, parameter in module.named_parameters(recurse=False):
                stored = after.get(f"{name}.{part}")
                if stored is not None and stored.dtype != torch.int8 and not isinstance(module, nn.Embedding):
                    parameter.copy_(stored)  # norms and biases that smoothing has changed
        got = model(ids).logits
    assert (got - wanted).square().mean() < 1e-3 * wanted.square().mean()


def test_it_can_be_made_float_again(gpt2: Path, int8: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    done = run_qtool("convert", int8, "--to", "bfloat16", "-o", tmp_path / "float")
    assert done.code == 0, done.stderr
    before, after = load_file(gpt2 / "model.safetensors"), load_file(tmp_path / "float" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
