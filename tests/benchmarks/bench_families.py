"""KL divergence of W8A8 in random models of many families, whose norms and embeddings have loud channels.

    bench_families.py [TYPE ...] [--seeds N]

The models are those of `tests.zoo`: two layers, 64 channels. Calibrated on 8 x 128 tokens, compared on 8 x 128 others,
computed by transformers in float32 from the dequantized weights, with inputs rounded as the checkpoint says. "plain" is
rounding to nearest, with a scale per output channel and a scale per token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from qtool.engines.job import CalibrationText, CalibrationTokens, OutputFolder, QuantizationJob, Resources
from qtool.engines.native.execute import execute
from qtool.engines.native.prepare import prepare
from qtool.recipe.load import load
from qtool.recipe.schema import Recipe
from tests.benchmarks._common import table
from tests.zoo import judge, models

TYPES = ("olmo2", "nemotron", "gemma", "gemma3_text", "llama", "qwen2", "qwen3", "phi", "gpt_neox")
COLUMNS = ("w8a8", "decided", "static in", "per token", "plain")
SAMPLES, LENGTH = 8, 128


class Silent:
    def progress(self, *_: Any, **__: Any) -> None: ...

    def warning(self, _: str) -> None: ...


def recipe() -> Recipe:
    """The default recipe, with attention decided, per token, and everything plainly rounded."""
    found = load("default")
    decided = found.measured("w8a8").schemes["w8a8"]
    content = [policy.model_dump(mode="json") for policy in decided]
    per_token = json.loads(json.dumps(content).replace('"mode": "auto"', '"mode": "dynamic"'))
    plainly = {"activations": "dynamic", "smoothing": "none", "clip": False, "rounding": "nearest"}
    plain = [{"layers": each["layers"], "quantize": each["quantize"], **plainly} for each in content]
    schemes = found.model_dump(mode="json")["schemes"] | {"decided": content, "per token": per_token, "plain": plain}
    return Recipe.model_validate(found.model_dump(mode="json") | {"schemes": schemes})


def quantize(source: Path, target: Path, calibration: torch.Tensor, how: Recipe, scheme: str) -> list[dict[str, Any]]:
    """What is reported of each group."""
    tokens = CalibrationTokens(calibration.tolist(), hashlib.sha256(calibration.numpy().tobytes()).hexdigest(), "zoo")
    job = QuantizationJob(
        model=source,
        output=OutputFolder(target, "compressed-tensors"),
        recipe=how,
        scheme=scheme,
        calibration=CalibrationText("zoo", len(calibration), calibration.shape[1], tokens=tokens),
        device="cpu",
        resources=Resources(threads=1),
    )
    report: Any = Silent()
    layers: list[dict[str, Any]] = execute(prepare(job, report), report).printed()["layers"]
    return layers


def rounded(source: Path, quantized: Path, folder: Path) -> Any:
    """What a checkpoint means, in transformers."""
    stored = judge._tensors(quantized)
    groups = json.loads((quantized / "config.json").read_text())["quantization_config"]["config_groups"].values()
    weights: dict[str, torch.Tensor] = {}
    steps: dict[str, tuple[float, float] | None] = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale", "_zero_point")):
            continue
        weights[name] = tensor
        if tensor.dtype == torch.int8:
            linear = name.removesuffix(".weight")
            weights[name] = tensor.float() * stored[f"{name}_scale"].float()
            scale = stored.get(f"{linear}.input_scale")
            steps[linear] = None if scale is None else (float(scale), float(stored[f"{linear}.input_zero_point"]))
    judge._write(source, folder, weights)
    model = judge.load("text", folder)
    for linear, fixed in steps.items():
        group = next(group for group in groups if any(matches(linear, target) for target in group["targets"]))
        rounding = round_tokens(fixed, symmetric=group["input_activations"]["symmetric"])
        model.get_submodule(linear).register_forward_pre_hook(
            lambda _module, args, rounding=rounding: (rounding(args[0]), *args[1:])
        )
    return model


def matches(linear: str, target: str) -> bool:
    return target == "Linear" or (bool(re.match(target[3:], linear)) if target.startswith("re:") else target == linear)


def round_tokens(fixed: tuple[float, float] | None, *, symmetric: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds what enters a linear: by a static scale and zero point, or each token by itself."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if fixed is not None:
            scale, zero = torch.tensor(fixed[0]), torch.tensor(fixed[1])
        elif symmetric:
            scale, zero = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127.5, torch.tensor(0.0)
        else:
            low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
            scale = ((high - low) / 255).clamp(min=1e-12)
            zero = (-128 - low / scale).round().clamp(-128, 127)
        return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale

    return rounded


@torch.no_grad()
def divergence(model: Any, ids: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = model(input_ids=ids, use_cache=False).logits.log_softmax(-1), wanted.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def measure(model_type: str, seed: int, folder: Path) -> dict[str, float]:
    """KL divergence by COLUMNS; "static in" is a share of the groups of attention."""
    source = models.make("text", model_type, folder / "float", seed=seed)
    model = judge.load("text", source)
    calibration, ids = (models.text(model, SAMPLES, LENGTH, seed=each) for each in (1, 2))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    found: dict[str, float] = {}
    for scheme in ("w8a8", "decided", "per token", "plain"):
        layers = quantize(source, folder / scheme, calibration, recipe(), scheme)
        found[scheme] = divergence(rounded(source, folder / scheme, folder / f"{scheme}-float"), ids, wanted)
        if scheme == "decided":
            chosen = [row["activations"] == "static" for row in layers if "static_cost" in row]
            found["static in"] = sum(chosen) / len(chosen)
    return found


def main() -> None:
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for model_type in options.types:
        found = []
        for seed in range(options.seeds):
            folder = Path(tempfile.mkdtemp())
            try:
                found.append(measure(model_type, seed, folder))
            finally:
                shutil.rmtree(folder)
        means = {column: statistics.mean(each[column] for each in found) for column in COLUMNS}
        rows.append([model_type, *(f"{means[c]:.0%}" if c == "static in" else f"{means[c]:.4f}" for c in COLUMNS)])
        print(*rows[-1], flush=True)
    print(table(["", *COLUMNS], rows))


if __name__ == "__main__":
    main()
