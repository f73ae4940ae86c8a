"""A change of the whole model as a source of weights that wraps another one: here a rotation of the residual stream."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.model.decoder import DecoderStream
from qtool.model.observe import observe, sample_stride
from qtool.model.probe import probe
from qtool.model.weights import ModelWeights, StoredWeights
from qtool.quant.group import Storage, quantize_group
from qtool.quant.layer import smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import linear_layers
from qtool.quant.types import QuantizedCache, QuantizedLinear
from qtool.recipe.schema import Policy

WIDTH = 64
READS = re.compile(r"(model\.layers\.\d+\.)(self_attn|mlp)\.(q|k|v|gate|up)_proj\.weight|lm_head\.weight")
WRITES = re.compile(r"model\.layers\.\d+\.(self_attn\.o|mlp\.down)_proj\.weight")


def rotation() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    q, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    return q.float()


def norm_before(name: str) -> str:
    found = READS.fullmatch(name)
    assert found
    if name == "lm_head.weight":
        return "model.norm.weight"
    return found[1] + ("input" if found[2] == "self_attn" else "post_attention") + "_layernorm.weight"


class Rotated:
    """A Llama with untied embeddings whose residual stream is x·Q instead of x, with the norms' gains folded.

    Whatever it gives is computed from the rows asked for; nothing is kept.
    """

    def __init__(self, inner: ModelWeights) -> None:
        self._inner = inner
        self._q = rotation()
        self.read: list[str] = []

    @property
    def where(self) -> str:
        return self._inner.where

    @property
    def names(self) -> list[str]:
        return self._inner.names

    def __contains__(self, name: str) -> bool:
        return name in self._inner

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def nbytes(self, name: str) -> int:
        return 2 * self._inner.nbytes(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.read.append(name)
        if name.endswith("norm.weight"):
            return torch.ones(self.shape(name), dtype=dtype or torch.float32)
        out, step = torch.empty(self.shape(name), dtype=dtype or torch.float32), 17
        for start in range(0, len(out), step):
            out[start : start + step] = self.rows(name, start, min(start + step, len(out)))
        return out

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read.append(name)
        if WRITES.fullmatch(name):
            return self._q[:, start:stop].t() @ self._inner.rows(name, 0, WIDTH)
        rows = self._inner.rows(name, start, stop)
        if READS.fullmatch(name):
            rows = rows * self._inner.tensor(norm_before(name), torch.float32)
        return rows @ self._q

    def gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        self.read.append(name)
        return self._inner.gather(name, ids).float() @ self._q

    def unchanged(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def linear(self, name: str) -> QuantizedLinear | None:
        return None

    def cache(self, name: str) -> QuantizedCache | None:
        return None

    def row_step(self, name: str) -> int:
        return 17

    def holding(self, names: Iterable[str]) -> AbstractContextManager[None]:
        return self._inner.holding(names)

    def together(self) -> AbstractContextManager[None]:
        return self._inner.together()


def rotated_on_disk(model: Path, folder: Path) -> Path:
    """The same, of whole matrices, by other formulas: x·Q enters, so W·diag(gain)·Q reads it, and Qᵀ·W writes to it."""
    tensors = {name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()}
    q, changed = rotation().double(), {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            changed[name] = torch.ones_like(tensor)
        elif name == "model.embed_tokens.weight":
            changed[name] = torch.einsum("vi,ij->vj", tensor, q)
        elif WRITES.fullmatch(name):
            changed[name] = torch.einsum("oi,oj->ji", tensor, q)
        else:
            changed[name] = torch.einsum("oi,i,ij->oj", tensor, tensors[norm_before(name)], q)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file({name: tensor.float().contiguous() for name, tensor in changed.items()}, folder / "model.safetensors")
    return folder


def logits(stream: DecoderStream, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden = stream.prologue(ids)
        for index in range(stream.depth):
            with stream.layer(index) as layer:
                hidden = stream.run(index, layer, hidden)
        normalized = stream.head.leaving(hidden).reshape(-1, WIDTH)
        return stream.head.logits(normalized, stream.head.rows(0, stream.head.vocabulary))


def quantized(stream: DecoderStream, ids: torch.Tensor) -> dict[str, QuantizedLinear]:
    """Layer 1, quantized by the default policy on what enters it."""
    found: dict[str, QuantizedLinear] = {}
    storage = Storage(torch.float32, weight_scale=lambda scale, _scheme: scale, input_scale=lambda scale: scale)
    with torch.no_grad():
        hidden = stream.prologue(ids)
        with stream.layer(0) as layer:
            hidden = stream.run(0, layer, hidden)
        with stream.layer(1) as layer:
            groups, names = probe(stream, 1, layer).groups, linear_layers(layer)
            statistics = {
                g.linears[0]: InputStatistics(stride=sample_stride(ids.numel()), with_hessian=False) for g in groups
            }
            list(observe(stream, 1, layer, [hidden], statistics))
            stored = {name: stream.stored(1, name) for name, _ in layer.named_parameters()}
        nearest = Policy.model_validate({"layers": ".*", "rounding": "nearest"})
        policies: dict[str, Policy | None] = dict.fromkeys(names, nearest)
        weights = StoredWeights(stream.weights, stored)
        folded, scales = smooth(weights, groups, policies, statistics, torch.float32)
        for group in groups:
            first = group.linears[0]
            found |= quantize_group(folded, group, policies, statistics[first], scales.get(first), storage).result()[0]
    return found


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(4, 500, (2, 48), generator=torch.Generator().manual_seed(0))


def test_a_rotated_residual_stream_gives_the_same_logits(tiny_llama: Path, ids: torch.Tensor) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    plain, rotated = FloatReader(checkpoint), Rotated(FloatReader(checkpoint))
    expected = logits(DecoderStream(checkpoint, dtype=torch.float32, weights=plain), ids)
    stream = DecoderStream(checkpoint, dtype=torch.float32, weights=rotated)
    found = logits(stream, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert set(rotated.read) == set(checkpoint.names)  # nothing is read around it
    hidden = DecoderStream(checkpoint, dtype=torch.float32).prologue(ids).hidden
    torch.testing.assert_close(stream.prologue(ids).hidden, hidden @ rotation(), rtol=1e-4, atol=1e-4)


def test_what_is_quantized_through_it_is_the_rotated_model(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    found = quantized(DecoderStream(checkpoint, dtype=torch.float32, weights=Rotated(FloatReader(checkpoint))), ids)
    on_disk = Checkpoint.open(rotated_on_disk(tiny_llama, tmp_path / "rotated"))
    expected = quantized(DecoderStream(on_disk, dtype=torch.float32), ids)
    original = quantized(DecoderStream(checkpoint, dtype=torch.float32), ids)
    assert set(found) == set(expected)
    for name, linear in found.items():
        torch.testing.assert_close(linear.weight_scale, expected[name].weight_scale, rtol=1e-3, atol=0)
        apart = (linear.weight.int() - expected[name].weight.int()).abs()
        assert int(apart.max()) <= 1  # sums in another order: a few numbers on the edge round the other way
        assert float((apart > 0).float().mean()) < 0.01
        assert float((linear.weight.int() - original[name].weight.int()).abs().float().mean()) > 5
