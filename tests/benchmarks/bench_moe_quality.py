"""Error of W8A8 in small random mixtures of experts, of the shapes of Qwen3-MoE and DeepSeek-V3.

    bench_moe_quality.py [TYPE ...] [--seeds N]

The models are those of `tests.families`: two layers of 192 channels, with 16 experts of 160 channels, of which each
token takes 4. In the residual stream 4 channels are 20 to 60 times as loud as the rest, and the rows of matrices differ
by a heavy-tailed factor. DeepSeek-V3 has a dense layer first. Calibrated on 16 x 256 tokens of the built-in text,
compared on 8 x 256 other ones of it.

Computed by transformers in float32 from the dequantized weights, with inputs rounded as the checkpoint says; every
token goes to the experts that the float model chooses. The error of blocks is that of what the last layer adds to its
input: squared, over its square. "plain" is rounding to nearest, with a scale per output channel and a scale per token;
"smoothquant" the same after SmoothQuant with an exponent of 0.5. "decided" is what a model gets that no recipe knows:
static activations only where they cost little.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import nn

from qtool.recipe.load import load
from qtool.recipe.schema import Recipe
from tests import families, simulate
from tests.benchmarks._common import table
from tests.benchmarks.bench_families import matches, quantize, round_tokens

TYPES = ("qwen3_moe", "deepseek_v3")
WAYS = (
    ("plain", "normal"),
    ("smoothquant", "normal"),
    ("w8a8", "normal"),
    ("decided", "normal"),
    ("w8a8-dynamic", "normal"),
    ("w8a8-asymmetric", "normal"),
    ("w8a8", "high"),
    ("w8a8-dynamic", "high"),
    ("w8a8-asymmetric", "high"),
)
LENGTH, CALIBRATION, COMPARED = 256, 16, 8


def make(model_type: str, folder: Path, tokenizer: Any, seed: int) -> Path:
    changes: dict[str, Any] = {"num_experts": 16} if model_type == "qwen3_moe" else {"n_routed_experts": 16}
    changes |= {"num_experts_per_tok": 4, "num_nextn_predict_layers": 0}
    return families.make(folder, model_type, tokenizer, seed=seed, **changes)


def recipe() -> Recipe:
    found = load("default").with_scheme("w8a8-asymmetric")
    assert found is not None
    content = found.model_dump(mode="json")
    plain = {"clip": False, "rounding": "nearest", "smoothing": "none"}
    dynamic = content["schemes"]["w8a8-dynamic"]
    content["schemes"] |= {"plain": [each | plain for each in dynamic]}
    smooth = {"smoothing": {"method": "smoothquant", "alpha": 0.5}}
    content["schemes"] |= {"smoothquant": [each | plain | smooth for each in dynamic]}
    content["schemes"] |= {"decided": found.measured("w8a8").model_dump(mode="json")["schemes"]["w8a8"]}
    return Recipe.model_validate(content)


Rounding = Callable[[torch.Tensor], torch.Tensor]


def rounded(source: Path, quantized: Path, folder: Path) -> Any:
    """What a checkpoint means, in transformers."""
    config = json.loads((quantized / "config.json").read_text())
    groups = config.pop("quantization_config")["config_groups"].values()
    stored, tensors, inputs = families.load(quantized), dict[str, torch.Tensor](), dict[str, Rounding]()
    for name, tensor in stored.items():
        if name.endswith((".weight_scale", ".input_scale", ".input_zero_point")):
            continue
        tensors[name] = tensor
        if tensor.dtype == torch.int8:
            linear = name.removesuffix(".weight")
            tensors[name] = tensor.float() * stored[f"{name}_scale"].float()
            group = next(group for group in groups if any(matches(linear, target) for target in group["targets"]))
            scale, fixed = stored.get(f"{linear}.input_scale"), None
            if scale is not None:
                fixed = float(scale), float(stored[f"{linear}.input_zero_point"])
            inputs[linear] = round_tokens(fixed, symmetric=group["input_activations"]["symmetric"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    families.save(tensors, folder)
    model = simulate.load_float(folder)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in inputs:
            module.register_forward_pre_hook(
                lambda _module, args, rounding=inputs[name]: (rounding(args[0]), *args[1:])
            )
        elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            module.forward = _experts(module, inputs[f"{name}.0.gate_proj"], inputs[f"{name}.0.down_proj"])
    return model


def _experts(module: Any, before: Rounding, between: Rounding) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = (before(hidden[token]) @ module.gate_up_proj[expert].t()).chunk(2, dim=-1)
            inner = between(module.act_fn(gate) * up) @ module.down_proj[expert].t()
            output.index_add_(0, token, inner * weights[token, place, None])
        return output

    return forward


def run(model: Any, ids: torch.Tensor, routes: simulate.Routes) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, what the last layer adds to its input)."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output) - args[0])

    handle = model.model.layers[-1].register_forward_hook(keep)
    logits = simulate.logits(model, ids, routes)
    handle.remove()
    return logits, seen[0]


def measure(model_type: str, seed: int, tokenizer: Any, text: torch.Tensor, folder: Path) -> list[tuple[float, float]]:
    """(error of blocks, KL divergence) by WAYS."""
    source, how = make(model_type, folder / "float", tokenizer, seed), recipe()
    calibration, ids = text[:CALIBRATION], text[CALIBRATION : CALIBRATION + COMPARED]
    model = simulate.load_float(source)
    routes = simulate.routes(model, ids)
    wanted, added = run(model, ids, routes)
    found = []
    for scheme, effort in WAYS:
        target = folder / f"{scheme}-{effort}"
        quantize(source, target, calibration, how.model_copy(update={"effort": effort}), scheme)
        logits, own = run(rounded(source, target, folder / f"{target.name}-float"), ids, routes)
        error = float((own - added).square().sum() / added.square().sum())
        found.append((error, simulate.divergence(logits, wanted)))
    return found


def main() -> None:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = families.train_tokenizer(2048)
    from pydoc_data.topics import topics

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    text = torch.tensor(ids[: (CALIBRATION + COMPARED) * LENGTH]).view(-1, LENGTH)
    rows = [[scheme, effort] for scheme, effort in WAYS]
    for model_type in options.types:
        found = []
        for seed in range(options.seeds):
            folder = Path(tempfile.mkdtemp())
            try:
                found.append(measure(model_type, seed, tokenizer, text, folder))
            finally:
                shutil.rmtree(folder)
            print(model_type, seed, *(f"{error:.2e} {kl:.2e}" for error, kl in found[-1]), flush=True)
        for row, each in zip(rows, zip(*found, strict=True), strict=True):
            errors, divergences = zip(*each, strict=True)
            row += [f"{statistics.mean(errors):.2e}", f"{statistics.mean(divergences):.5f}"]
    columns = [f"{model_type}: {what}" for model_type in options.types for what in ("error of blocks", "KL")]
    print(table(["scheme", "effort", *columns], rows))


if __name__ == "__main__":
    main()
