"""Exact OSL against a plain reimplementation of mindspore-gs 1.4.1's steps on a whole transformers layer.

Nothing is shared or skipped here: every candidate runs the complete float32 layer, every clip ratio is scored in
full. The steps themselves were checked against an output of mindspore-gs (tests/benchmarks/bench_exact_osl.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GROUPS = (
    ("input_layernorm", ATTENTION),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
SAMPLES, LENGTH = 2, 48


def fake_weight(w: torch.Tensor) -> torch.Tensor:
    scale = (w.abs().amax(1, keepdim=True).double() * 2 / 255).float()
    return (w / scale).round().clamp(-128, 127) * scale


def range_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.min().clamp(max=0).double(), x.max().clamp(min=0).double()
    scale = (high - low) / 255
    return scale.float(), torch.round(-128 - low / scale).float()


def fake_input(x: torch.Tensor) -> torch.Tensor:
    scale, offset = range_of(x)
    return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale


def weight_of(layer: torch.nn.Module, name: str) -> torch.Tensor:
    return layer.get_submodule(name).get_parameter("weight")


class Naive:
    """One decoder layer of a Llama, quantized the slow way."""

    def __init__(
        self, layer: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor], samples: torch.Tensor
    ) -> None:
        self.layer, self.run, self.samples = layer, run, samples
        self.alphas: list[float] = []
        self.s = [self.search(group) for group in range(4)]
        for group in range(4):
            self.fold(group)
        inputs = self.inputs()
        for group, (_, names) in enumerate(GROUPS):
            for name in names:
                self.clip(name, torch.cat(inputs[group]))
        self.ranges = [range_of(torch.cat(x)) for x in self.inputs()]

    def inputs(self) -> list[list[torch.Tensor]]:
        seen: list[list[torch.Tensor]] = [[], [], [], []]
        handles = [
            self.layer.get_submodule(names[0]).register_forward_pre_hook(
                lambda _m, args, group=group: seen[group].append(args[0][0])
            )
            for group, (_, names) in enumerate(GROUPS)
        ]
        for sample in self.samples:
            self.run(sample[None])
        for handle in handles:
            handle.remove()
        return seen

    def search(self, group: int) -> torch.Tensor:
        names = GROUPS[group][1]
        linears = [self.layer.get_submodule(name) for name in names]
        original = [weight_of(self.layer, name).clone() for name in names]
        act = torch.cat(self.inputs()[group]).abs().amax(0)
        weight = torch.cat(original).abs().amax(0)
        if group == 1:
            act, weight = (self.per_kv_head(v) for v in (act, weight))
        outputs = [self.run(sample[None]) for sample in self.samples]
        best: tuple[float, float, torch.Tensor] | None = None
        for step in range(20):
            alpha = step / 20
            s = (act**alpha / weight ** (1 - alpha)).clamp(min=1e-5)
            s[(act == 0) | (weight == 0)] = 1
            handles = [
                linear.register_forward_pre_hook(lambda _m, args, s=s: (fake_input(args[0] / s),)) for linear in linears
            ]
            for linear, w in zip(linears, original, strict=True):
                linear.get_parameter("weight").copy_(fake_weight(w * s))
            loss = sum(
                float((self.run(sample[None]) - out).square().mean())
                for sample, out in zip(self.samples, outputs, strict=True)
            )
            for handle in handles:
                handle.remove()
            for linear, w in zip(linears, original, strict=True):
                linear.get_parameter("weight").copy_(w)
            if best is None or loss < best[0]:
                best = (loss, alpha, s)
        assert best is not None
        self.alphas.append(best[1])
        return best[2]

    def per_kv_head(self, values: torch.Tensor) -> torch.Tensor:
        grouped = values.view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)

    def fold(self, group: int) -> None:
        producer, names = GROUPS[group]
        s = self.s[group]
        for name in names:
            weight_of(self.layer, name).mul_(s)
        weight = weight_of(self.layer, producer)
        if group == 1:
            s = s.view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)[:, 0].reshape(-1)
        weight.div_(s if weight.dim() == 1 else s[:, None])

    def clip(self, name: str, x: torch.Tensor) -> None:
        weight = weight_of(self.layer, name)
        x = x[:: max(1, len(x) // 512)]
        for row in range(len(weight)):
            w, best = weight[row].clone(), None
            for step in range(10):
                bound = w.abs().max() * (1 - step / 20)
                candidate = w.clamp(-bound, bound)
                error = float((x @ (fake_weight(candidate[None])[0] - w)).square().mean())
                if best is None or error < best[0]:
                    best = (error, candidate)
            assert best is not None
            weight[row] = best[1]


@pytest.fixture(scope="module")
def result(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_qtool: Callable[..., Any]) -> Any:
    folder = tmp_path_factory.mktemp("osl")
    model = folder / "model"
    model.mkdir()
    for file in tiny_llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = {name: w.float() for name, w in load_file(tiny_llama / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    options = ("--recipe", "golden-stick-osl", "--samples", SAMPLES, "--seq-len", LENGTH)
    done = run_qtool("quantize", model, "--output", folder / "out", *options)
    assert done.code == 0, done.stderr
    report = json.loads((folder / "out" / "qtool.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in (folder / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    return model, report, tensors


@pytest.fixture(scope="module")
def naive(result: Any) -> list[Naive]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qtool.calibration.text import load

    folder = result[0]
    ids = load("builtin", AutoTokenizer.from_pretrained(folder), samples=SAMPLES, seq_len=LENGTH, seed=0).ids
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        hidden = model.model(ids, output_hidden_states=True).hidden_states
        rotary = model.model.rotary_emb(hidden[0], position_ids=torch.arange(LENGTH)[None])
        return [
            Naive(layer, partial(layer, position_embeddings=rotary), hidden[index])
            for index, layer in enumerate(model.model.layers)
        ]


def test_the_same_alphas(result: Any, naive: list[Naive]) -> None:
    chosen = [row["alpha"] for row in result[1]["layers"]]
    assert chosen == [alpha for layer in naive for alpha in layer.alphas]


def test_the_same_activation_ranges(result: Any, naive: list[Naive]) -> None:
    for index, layer in enumerate(naive):
        for (scale, offset), (_, names) in zip(layer.ranges, GROUPS, strict=True):
            for name in names:
                prefix = f"model.layers.{index}.{name}"
                torch.testing.assert_close(result[2][f"{prefix}.input_scale"][0], scale, rtol=1e-4, atol=0)
                assert result[2][f"{prefix}.input_offset"].unique().tolist() == [int(offset)]


def test_the_same_integers(result: Any, naive: list[Naive]) -> None:
    for index, layer in enumerate(naive):
        for _, names in GROUPS:
            for name in names:
                weight = weight_of(layer.layer, name)
                scale = (weight.abs().amax(1, keepdim=True).double() * 2 / 255).float()
                expected = (weight / scale).round().clamp(-128, 127).to(torch.int8)
                found = result[2][f"model.layers.{index}.{name}.weight"]
                assert (found == expected).float().mean() >= 0.995, name


def test_norms_carry_the_inverse(result: Any, naive: list[Naive]) -> None:
    for index, layer in enumerate(naive):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found = result[2][f"model.layers.{index}.{norm}.weight"]
            torch.testing.assert_close(found, weight_of(layer.layer, norm), rtol=1e-5, atol=1e-7)
