"""The streamed comparison against transformers running both models whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.errors import InputError, QtoolError
from qtool.evaluation.comparison import compare
from qtool.evaluation.job import Comparison, ComparisonJob, EvaluationText

WINDOWS, LENGTH = 4, 48


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English text that no calibration has seen."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(topics[sorted(topics)[-1]][:4000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def job(text_file: Path) -> Callable[..., ComparisonJob]:
    """job(base, quantized..., windows=, length=) -> a job for `comparison.compare`."""

    def make(base: Path, *quantized: Path, windows: int = WINDOWS, length: int = LENGTH) -> ComparisonJob:
        return ComparisonJob(base=base, quantized=quantized, text=EvaluationText(str(text_file), windows, length))

    return make


@pytest.fixture(scope="module")
def quantize(tmp_path_factory: pytest.TempPathFactory, run_qtool: Callable[..., Any]) -> Callable[..., Path]:
    """quantize(model, *options) -> the folder that `qtool quantize` made of it."""

    def make(model: Path, *options: str) -> Path:
        output = tmp_path_factory.mktemp("quantized") / "model"
        done = run_qtool("quantize", model, "--output", output, "--samples", "4", "--seq-len", "64", *options)
        assert done.code == 0, done.stderr
        return output

    return make


def figures(base: Path, quantized: Path, text: Path) -> dict[str, float]:
    """The figures, from transformers' whole models in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(base)(text.read_text(encoding="utf-8"))["input_ids"]
    ids = torch.tensor(tokens[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    logs = []
    for path in (base, quantized):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logs.append(model(ids).logits[:, :-1].double().log_softmax(-1))
    p, q = logs
    perplexities = [math.exp(-log.gather(2, ids[:, 1:, None]).mean().item()) for log in logs]
    kl = (p.exp() * (p - q)).sum(-1)
    five = [log.topk(5).indices for log in logs]
    return {
        "base_perplexity": perplexities[0],
        "quantized_perplexity": perplexities[1],
        "kl_divergence": kl.mean().item(),
        "kl_median": kl.median().item(),
        "kl_p99": float(kl.flatten().quantile(0.99)),
        "kl_max": kl.max().item(),
        "top5_agreement": (five[0][..., None] == five[1][..., None, :]).any(-1).double().mean().item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


class Progress:
    """A worker's report that keeps the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def progress(self, stage: str, done: int, total: int, unit: str = "layers") -> None:
        if stage not in self.stages:
            self.stages.append(stage)


def run_all(job: ComparisonJob, progress: Progress | None = None) -> list[dict[str, Any]]:
    """What is found, through the pipe and back."""
    silent: Any = progress or Progress()
    found = compare(ComparisonJob.from_json(json.loads(json.dumps(job.to_json()))), silent)
    contents: list[dict[str, Any]] = json.loads(json.dumps([each.to_json() for each in found]))
    assert [Comparison.from_json(content) for content in contents] == found
    return contents


def run(job: ComparisonJob) -> dict[str, Any]:
    """The same of a single model."""
    (content,) = run_all(job)
    return content


def assert_agrees(found: dict[str, Any], expected: dict[str, float], kl: float = 1e-3) -> None:
    """Within float error; a few activations round the other way when the order of a sum differs."""
    for name in ("base_perplexity", "quantized_perplexity"):
        assert found[name]["value"] == pytest.approx(expected[name], rel=1e-4)
    for name in ("kl_divergence", "kl_median", "kl_p99", "kl_max"):
        more = 1 if name == "kl_divergence" else 5  # a mean over all tokens differs least
        assert found[name]["value"] == pytest.approx(expected[name], rel=more * kl, abs=more * 1e-6)
    parts = found["kl_along_text"]["values"]
    assert sum(parts) / len(parts) == pytest.approx(found["kl_divergence"]["value"])  # parts are of one token here
    assert found["top5_agreement"]["value"] == pytest.approx(expected["top5_agreement"], abs=0.002)
    assert found["top1_agreement"]["value"] == pytest.approx(
        expected["top1_agreement"], abs=1.01 / (WINDOWS * (LENGTH - 1))
    )


@pytest.fixture(scope="module")
def dynamic(tiny_llama: Path, quantize: Callable[..., Path]) -> Path:
    return quantize(tiny_llama, "--scheme", "w8a8-dynamic")


def test_float_models(
    tiny_llama: Path, make_model: Callable[..., Path], job: Callable[..., Any], text_file: Path
) -> None:
    other = make_model("llama", name="other", seed=1)
    found = run(job(tiny_llama, other))
    assert_agrees(found, figures(tiny_llama, other, text_file))
    assert found["text"] | {"sha256": ""} == {
        "source": "text.txt",
        "sha256": "",
        "windows": WINDOWS,
        "length": LENGTH,
    }


def test_a_model_with_itself(tiny_llama: Path, job: Callable[..., Any]) -> None:
    found = run(job(tiny_llama, tiny_llama))
    assert found["kl_divergence"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["top1_agreement"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["perplexity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["base_perplexity"] == found["quantized_perplexity"]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_compressed_tensors(
    tiny_llama: Path, quantize: Callable[..., Path], job: Callable[..., Any], text_file: Path, scheme: str
) -> None:
    quantized = quantize(tiny_llama, "--scheme", scheme)
    expected = figures(tiny_llama, quantized, text_file)
    assert expected["kl_divergence"] > 1e-5  # there is something to see
    assert_agrees(run(job(tiny_llama, quantized)), expected, kl=0.02)


def test_several_models_share_their_base(
    tiny_llama: Path,
    make_model: Callable[..., Path],
    dynamic: Path,
    quantize: Callable[..., Path],
    job: Callable[..., Any],
) -> None:
    """Each as if it were alone, to the last bit; and the base runs once."""
    others = [dynamic, quantize(tiny_llama, "--scheme", "w8a8"), make_model("llama", name="third", seed=1)]
    progress = Progress()
    together = run_all(job(tiny_llama, *others), progress)
    told = {"date": "", "seconds": 0, "peak_memory_bytes": 0}
    alone = [run(job(tiny_llama, other)) for other in others]
    assert [each | told for each in together] == [each | told for each in alone]
    assert progress.stages.count("base") == 1
    assert [stage for stage in progress.stages if stage.startswith("quantized")] == [
        f"quantized {i} of 3" for i in (1, 2, 3)
    ]
    for found in together:
        assert sum(found["kl_by_window"]) / WINDOWS == pytest.approx(found["kl_divergence"]["value"])
        assert {"python", "torch", "transformers"} <= found["versions"].keys()


def test_one_wrong_model_among_several_is_refused_before_any_runs(
    tiny_llama: Path, dynamic: Path, make_model: Callable[..., Path], job: Callable[..., Any]
) -> None:
    progress = Progress()
    with pytest.raises(InputError, match="2 decoder layers against 3"):
        run_all(job(tiny_llama, dynamic, make_model("llama", name="deeper", num_hidden_layers=3)), progress)
    assert progress.stages == []


@pytest.mark.parametrize("format_name", ["golden-stick", "modelslim"])
def test_formats_for_ascend(
    tiny_llama: Path,
    quantize: Callable[..., Path],
    job: Callable[..., Any],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    format_name: str,
) -> None:
    """Against whole models whose linears compute what the format's runtime does with the tensors in the file."""
    from transformers import AutoModelForCausalLM

    quantized = quantize(tiny_llama, "--scheme", "w8a8", "--format", format_name)
    tensors: dict[str, torch.Tensor] = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    floats = {name: tensor for name, tensor in tensors.items() if name in model.state_dict()}
    model.load_state_dict({name: t.float() for name, t in floats.items() if t.dtype != torch.int8}, strict=False)
    modes = set()
    for name, module in model.named_modules():
        if tensors.get(f"{name}.weight", torch.empty(0)).dtype == torch.int8:
            parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}
            monkeypatch.setattr(module, "forward", _static(parts) if "deq_scale" in parts else _dynamic(parts))
            modes.add("deq_scale" in parts)
    assert modes == {True, False}
    original = AutoModelForCausalLM.from_pretrained
    loaded = {str(quantized): model}
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **kw: loaded.get(str(path)) or original(path, **kw)
    )
    assert_agrees(run(job(tiny_llama, quantized)), figures(tiny_llama, quantized, text_file), kl=0.02)


def _static(parts: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    deq_scale = parts["deq_scale"]

    def forward(x: torch.Tensor) -> torch.Tensor:
        q = (x / parts["input_scale"].float()).round() + parts["input_offset"].float()
        product = q.clamp(-128, 127).double() @ parts["weight"].double().T + parts["quant_bias"].double()
        return (product * deq_scale.double()).float()

    return forward


def _dynamic(parts: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        product = (x / scale).round().clamp(-128, 127).double() @ parts["weight"].double().T
        return (product * scale.double() * parts["weight_scale"].double().reshape(-1)).float()

    return forward


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen2", {"tie_word_embeddings": True}),  # biases on q, k, v
        ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}),  # capped logits, scaled embeddings
        ("cohere", {"logit_scale": 0.25}),  # scaled logits
        ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    ],
)
def test_architectures(
    make_model: Callable[..., Path],
    job: Callable[..., Any],
    text_file: Path,
    model_type: str,
    options: dict[str, Any],
) -> None:
    base, other = (make_model(model_type, name=f"{model_type}-{seed}", seed=seed, **options) for seed in (0, 1))
    assert_agrees(run(job(base, other)), figures(base, other, text_file))


def test_a_quantized_output_projection(
    dynamic: Path, tiny_llama: Path, job: Callable[..., Any], text_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(dynamic, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    weight = tensors["lm_head.weight"].float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    tensors["lm_head.weight"] = (weight / scale).round().to(torch.int8)
    tensors["lm_head.weight_scale"] = scale
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["ignore"].remove("lm_head")
    quantization["config_groups"]["group_0"]["targets"].append("lm_head")
    (model / "config.json").write_text(json.dumps(config))
    assert_agrees(run(job(tiny_llama, model)), figures(tiny_llama, model, text_file), kl=0.02)


def test_the_vocabulary_is_cut_into_slices(
    tiny_llama: Path, dynamic: Path, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(job(tiny_llama, dynamic))
    monkeypatch.setattr("qtool.evaluation.comparison._ROWS", 100)
    monkeypatch.setattr("qtool.evaluation.comparison._TOKENS", 60)
    sliced = run(job(tiny_llama, dynamic))
    assert sliced["kl_divergence"]["value"] == pytest.approx(whole["kl_divergence"]["value"], rel=0.02)
    assert sliced["base_perplexity"]["value"] == pytest.approx(whole["base_perplexity"]["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, "2 decoder layers against 3"),
        ({"vocab_size": 520}, "512 vocabulary entries against 520"),
        ({"hidden_size": 32}, "64 hidden channels against 32"),
    ],
)
def test_different_models(
    tiny_llama: Path,
    make_model: Callable[..., Path],
    job: Callable[..., Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        run(job(tiny_llama, make_model("llama", name="different", **options)))


def test_different_tokenizers(tiny_llama: Path, job: Callable[..., Any], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for letter, other in (("e", "t"), ("a", "o")):
        vocabulary[letter], vocabulary[other] = vocabulary[other], vocabulary[letter]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="tokenizers make different tokens"):
        run(job(tiny_llama, model))


def test_tokenizer_files_that_differ_in_nothing_that_matters(
    tiny_llama: Path, job: Callable[..., Any], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=1), encoding="utf-8")
    assert run(job(tiny_llama, model))["kl_divergence"]["value"] == 0


def test_a_missing_tokenizer(tiny_llama: Path, job: Callable[..., Any], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        run(job(model, tiny_llama))


def test_too_little_text(tiny_llama: Path, job: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="too little text") as caught:
        run(job(tiny_llama, tiny_llama, windows=1000))
    assert caught.value.hint is not None
    assert "--windows" in caught.value.hint
    assert "--samples" not in caught.value.hint


def test_windows_longer_than_the_context(tiny_llama: Path, job: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="context is 512"):
        run(job(tiny_llama, tiny_llama, length=513))


def test_a_broken_scale(tiny_llama: Path, dynamic: Path, job: Callable[..., Any], tmp_path: Path) -> None:
    model = shutil.copytree(dynamic, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QtoolError, match=r"after model\.layers\.0 are not finite"):
        run(job(tiny_llama, model))


def test_int8_weights_that_nothing_describes(
    tiny_llama: Path, dynamic: Path, job: Callable[..., Any], tmp_path: Path
) -> None:
    model = shutil.copytree(dynamic, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has dtype I8, expected a float type"):
        run(job(tiny_llama, model))
