"""Estimated divergences against measured ones: the model quantized in one group only, exported, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.engines.job import Job
from qtool.engines.native.engine import quantize
from qtool.evaluate.comparison import compare
from qtool.recipe.load import load
from qtool.recipe.schema import Activations, Policy, Recipe
from qtool.tuning.worker import main

CALIBRATION = {"data": "builtin", "samples": 8, "seq_len": 64, "seed": 0}
TEXT = {"text": "builtin", "windows": 16, "length": 64, "trust_remote_code": False}


class Silent:
    def progress(self, *_: Any) -> None: ...

    def warning(self, _: str) -> None: ...


def sensitivity(model: Path, recipe: Recipe, modes: list[str]) -> dict[str, Any]:
    job = {
        "model": str(model),
        "recipe": recipe.model_dump(mode="json"),
        "scheme": recipe.default_scheme,
        "format": "compressed-tensors",
        "modes": modes,
        "calibration": CALIBRATION,
        **TEXT,
    }
    return main(job, Silent())  # type: ignore[arg-type]


def only(linears: list[str], mode: str) -> Recipe:
    pattern = "|".join(name.replace(".", r"\.") for name in linears)
    policy = Policy(layers=pattern, activations=Activations(mode=mode))  # type: ignore[arg-type]
    return Recipe(name="only", description="one group", default_scheme="s", schemes={"s": [policy]})


def measured(model: Path, output: Path, recipe: Recipe) -> float:
    job = Job(
        model=str(model),
        output=str(output),
        format="compressed-tensors",
        recipe=recipe.model_dump(mode="json"),
        scheme=recipe.default_scheme,
        calibration=CALIBRATION,
    )
    silent: Any = Silent()
    quantize(asdict(job), silent)
    pair: dict[str, Any] = {"base": str(model), "quantized": str(output), "runtime": None, "engine": {}}
    return float(compare({**pair, **TEXT}, silent)["kl_divergence"]["value"])


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # Gemma caps its logits and scales its embeddings
def test_estimates_are_near_the_truth(make_model: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    model = make_model(model_type)
    found = sensitivity(model, load("default"), ["static", "dynamic"])
    groups = found["groups"]
    assert len(groups) == 2 * 2 * 4  # ways, layers, groups
    truth = [measured(model, tmp_path / str(i), only(g["linears"], g["way"])) for i, g in enumerate(groups)]
    both = torch.tensor([[group["kl"] for group in groups], truth]).log()
    assert float((both[1].max() - both[1].min()).exp()) > 10  # there is something to tell apart
    assert float(both.corrcoef()[0, 1]) > 0.95
    # equal tokens make equal noise where the input is the embedding alone, which the estimate doesn't know
    assert float((both[0] - both[1]).abs().max().exp()) < 2.5
    assert float((both[0] - both[1]).mean().exp()) == pytest.approx(1, abs=0.25)


def test_linears_add_up_to_their_group(tiny_llama: Path) -> None:
    found = sensitivity(tiny_llama, load("default"), [])
    of_linear = {linear["linears"][0]: linear for linear in found["linears"]}
    assert len(of_linear) == 14
    for group in found["groups"]:
        together = sum(of_linear[name]["kl"] for name in group["linears"])
        assert 0.3 < group["kl"] / together < 3  # they share the input's noise, so not quite
        errors = [of_linear[name]["relative_error"] for name in group["linears"]]
        assert min(errors) <= group["relative_error"] <= max(errors)


def test_sizes(tiny_llama: Path) -> None:
    found = sensitivity(tiny_llama, load("default"), [])
    assert found["bytes"]["model.layers.0.mlp.down_proj"] == [2 * 64 * 160, 64 * 160 + 4 * 64]


def test_what_the_recipe_leaves_float_is_left_out(tiny_llama: Path) -> None:
    recipe = only(["model.layers.1.mlp.down_proj"], "dynamic")
    found = sensitivity(tiny_llama, recipe, [])
    assert [group["linears"] for group in found["groups"]] == [["model.layers.1.mlp.down_proj"]]


def test_drawn_tokens_follow_the_model(tiny_llama: Path) -> None:
    """The variance of log p's gradient by the logits is that of tokens drawn from p, draw by draw."""
    from qtool.checkpoint.reader import Checkpoint
    from qtool.engines.native.stream import DecoderStream
    from qtool.tuning import sensitivity as module

    stream = DecoderStream(Checkpoint.open(tiny_llama), dtype=torch.float32)
    hidden = torch.randn(1, 1, 64).expand(4000, 1, 64).reshape(4000, 64)
    with torch.no_grad():
        drawn, normalizer = module._draw(stream, hidden)
        logits = stream.logits(hidden[:1], stream.head(0, stream.vocabulary))[0]
    assert normalizer[0] == pytest.approx(float(logits.logsumexp(0)), rel=1e-5)
    shares = torch.bincount(drawn.flatten(), minlength=stream.vocabulary) / drawn.numel()
    p = logits.softmax(0)
    assert float((shares - p).abs().sum()) < 0.25  # 8,000 draws over 512 tokens
    assert int(p.argmax()) == int(shares.argmax())
