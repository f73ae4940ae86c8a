"""Estimated divergences against measured ones: the model quantized in one group only, exported, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
from qtool.engines.native import device
from qtool.engines.native.execute import execute
from qtool.engines.native.prepare import prepare
from qtool.evaluation.comparison import compare
from qtool.evaluation.job import ComparisonJob, EvaluationText
from qtool.model.decoder import DecoderStream
from qtool.model.gradients import gradients, replaced
from qtool.model.state import Batch
from qtool.recipe.load import load
from qtool.recipe.schema import Policy, Recipe
from qtool.scheme import named
from qtool.tuning.job import Sensitivities, SensitivityJob
from qtool.tuning.worker import main
from tests import families, simulate

CALIBRATION = CalibrationText("builtin", 8, 64)
TEXT = EvaluationText("builtin", 16, 64)


class Silent:
    def progress(self, *_: Any) -> None: ...

    def warning(self, _: str) -> None: ...


@pytest.fixture(autouse=True)
def float32_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates are in float32. Where processors multiply bfloat16 faster, the engine takes that, and its calibration
    sends a few tokens to other experts, which is no error of the estimates."""
    monkeypatch.setattr("qtool.engines.native.device.compute_dtype", lambda device, *, exact: torch.float32)


def sensitivity(model: Path, recipe: Recipe, modes: list[str], precisions: tuple[str, ...] = ()) -> dict[str, Any]:
    """What is found, through the pipe."""
    job = SensitivityJob(
        model=model,
        recipe=recipe,
        scheme=recipe.default_scheme,
        format="compressed-tensors",
        modes=tuple(modes),
        precisions=precisions,
        text=TEXT,
        calibration=CALIBRATION,
    )
    found = main(json.loads(json.dumps(job.to_json())), Silent())  # type: ignore[arg-type]
    assert Sensitivities.from_json(json.loads(json.dumps(found))).to_json() == found
    return found


def only(linears: list[str], mode: str) -> Recipe:
    return of_these(linears, Policy(layers="x").with_mode(mode))


def of_these(linears: list[str], policy: Policy) -> Recipe:
    """Just these linears are quantized, as the policy says."""
    policy = policy.model_copy(update={"layers": "|".join(name.replace(".", r"\.") for name in linears)})
    return Recipe(name="only", description="one group", default_scheme="s", schemes={"s": [policy]})


def measured(model: Path, output: Path, recipe: Recipe) -> float:
    job = QuantizationJob(
        model=model,
        output=OutputFolder(output, "compressed-tensors"),
        recipe=recipe,
        scheme=recipe.default_scheme,
        calibration=CALIBRATION,
        device="cpu",
    )
    silent: Any = Silent()
    execute(prepare(job, silent), silent)
    (found,) = compare(ComparisonJob(base=model, quantized=(output,), text=TEXT), silent)
    figures = found.figures
    return figures.kl_divergence["value"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_estimates_of_precisions_are_near_the_truth(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """So that they can be weighed against each other, not only linears of one precision."""
    model, names = make_model("llama"), ("W8A8-dynamic", "W4A16", "W4A8", "FP8-dynamic")
    found = sensitivity(model, load("default"), [], names)
    assert found["group_size"] == 32
    wanted = (named(f"{name}-g32" if name.startswith("W4") else name) for name in names)
    schemes = {scheme.label: scheme for scheme in wanted if scheme is not None}
    groups = [group for group in found["groups"] if group["way"] in schemes and ".1." in group["linears"][0]]
    assert len(groups) == 4 * 4  # ways, groups of the last layer
    predicted, truth = [], []
    for i, group in enumerate(groups):
        scheme = schemes[group["way"]]
        recipe = of_these(group["linears"], Policy(layers="x").with_scheme(scheme))
        truth.append(measured(model, tmp_path / str(i), recipe))
        predicted.append(group["kl"])
        shapes = [Checkpoint.open(model).info(f"{name}.weight").shape for name in group["linears"]]
        assert group["bytes"] == sum(scheme.weights.nbytes(shape) for shape in shapes)
    both = torch.tensor([predicted, truth]).log()
    assert float((both[1].max() - both[1].min()).exp()) > 20  # from int8 to int4
    assert float(both.corrcoef()[0, 1]) > 0.95
    assert float((both[0] - both[1]).abs().max().exp()) < 4
    ranks = both.argsort(dim=1).argsort(dim=1).float()
    assert float(ranks.corrcoef()[0, 1]) > 0.8


EVERYTHING = Recipe(
    name="everything",
    description="every linear but routers, per token",
    default_scheme="s",
    schemes={"s": [Policy(layers=r".*\.(gate|kv_b_proj)", quantize=False), Policy(layers=".*")]},
)


@pytest.fixture(scope="module")
def mixture(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """mixture(model_type) -> a tiny mixture of experts, in float32."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            folder = tmp_path_factory.mktemp("mixtures") / model_type
            made[model_type] = families.make(folder, model_type, tiny_tokenizer, dtype=torch.float32)
        return made[model_type]

    return make


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "mixtral", "glm4_moe"])
def test_gradients_through_experts_are_those_of_transformers(mixture: Callable[[str], Path], model_type: str) -> None:
    stream = DecoderStream(Checkpoint.open(mixture(model_type)), dtype=torch.float32)
    ids = torch.randint(4, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    seeds = torch.randn(2, 2, 24, stream.hidden_size, generator=torch.Generator().manual_seed(1))
    model, kept = simulate.load_float(mixture(model_type)), {}

    def keep(_: Any, args: Any, output: torch.Tensor) -> None:
        kept["x"], kept["y"] = args[0], output

    model.model.layers[1].register_forward_hook(keep)
    embedded = model.model.embed_tokens(ids).requires_grad_()
    model(inputs_embeds=embedded, use_cache=False)
    expected = [torch.autograd.grad(kept["y"], kept["x"], seed, retain_graph=True)[0] for seed in seeds]

    with stream.layer(1) as layer, replaced(stream.routed(1)) as passages:
        x = kept["x"].detach().requires_grad_()
        found = gradients(stream.routed(1), passages, stream.run(1, layer, Batch(ids, (x,))).hidden, [x], seeds)
    assert found.by_experts is not None
    for (by_x,), wanted in zip(found.by, expected, strict=True):
        torch.testing.assert_close(by_x, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine computes in float32 on every processor, as the estimates do."""
    monkeypatch.setattr(device, "compute_dtype", lambda *_, **__: torch.float32)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("model_type", ["deepseek_v3", "mixtral"])
def test_estimates_for_experts_are_near_the_truth(
    mixture: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    """Of the last layer's, whose noise sends no token elsewhere."""
    model = mixture(model_type)
    found = sensitivity(model, EVERYTHING, [])
    assert set(found["bytes"]) == {name for group in found["groups"] for name in group["linears"]} | {
        name for name in found["bytes"] if name.endswith((".gate", "kv_b_proj"))
    }
    groups = [group for group in found["groups"] if ".1." in group["linears"][0] and "_attn" not in group["linears"][0]]
    experts = next(group for group in groups if ".experts." in group["linears"][0])
    count = families.routed(json.loads((model / "config.json").read_text()))
    assert len(experts["linears"]) == 3 * count
    for number, group in enumerate(groups):
        truth = measured(model, tmp_path / str(number), only(group["linears"], "dynamic"))
        assert group["kl"] == pytest.approx(truth, rel=0.3), group["linears"][0]
    of_linear = {linear["linears"][0]: linear["kl"] for linear in found["linears"]}
    together = sum(of_linear[name] for name in experts["linears"])
    assert 0.5 < experts["kl"] / together < 2
    silent = [name for name in experts["linears"] if f".experts.{families.STARVED}." in name]
    assert {of_linear[name] for name in silent} == {0.0}


def test_experts_are_measured_as_the_scheme_has_them(mixture: Callable[[str], Path]) -> None:
    found = sensitivity(mixture("qwen3_moe"), EVERYTHING, ["static", "dynamic"])
    ways = {(group["way"], ".experts." in group["linears"][0]) for group in found["groups"]}
    assert ways == {("static", False), ("dynamic", False), ("dynamic", True)}


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
    from qtool.model.gradients import _draw

    stream = DecoderStream(Checkpoint.open(tiny_llama), dtype=torch.float32)
    hidden = torch.randn(1, 1, 64).expand(4000, 1, 64).reshape(4000, 64)
    with torch.no_grad():
        drawn, normalizer = _draw(stream, hidden, 2)
        logits = stream.head.logits(hidden[:1], stream.head.rows(0, stream.head.vocabulary))[0]
    assert normalizer[0] == pytest.approx(float(logits.logsumexp(0)), rel=1e-5)
    shares = torch.bincount(drawn.flatten(), minlength=stream.head.vocabulary) / drawn.numel()
    p = logits.softmax(0)
    assert float((shares - p).abs().sum()) < 0.25  # 8,000 draws over 512 tokens
    assert int(p.argmax()) == int(shares.argmax())
