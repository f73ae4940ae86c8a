"""The rows about the runtimes: they agree with what is refused, and the page shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.recipe import load
from qtool.runtimes import facts, table
from tests import families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"


def rows(runtime: str, model: str, scheme: str) -> dict[str, table.Row]:
    """By format."""
    named = [row for row in table.rows() if row.runtime == runtime and model in row.models and scheme in row.schemes]
    found = {row.format: row for row in named}
    assert len(found) == len(named)
    return found


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == table.markdown(), "run `make docs`"


def test_every_family_scheme_and_format_has_its_row() -> None:
    model_types = {name for recipe in map(load.load, load.names()) for name in recipe.match.model_type}
    assert model_types == {family.model_type for family in table.FAMILIES}
    for runtime in facts.KNOWN:
        read = {reads.format for reads in runtime.reads} - {"float"}
        for family in table.FAMILIES:
            for scheme in family.schemes:
                assert rows(runtime.title, family.architecture, scheme).keys() == read


@pytest.mark.parametrize(
    ("runtime", "model", "scheme", "answer", "checked"),
    [
        ("vLLM", "LlamaForCausalLM", "w8a8", "yes", "run"),
        ("transformers", "MixtralForCausalLM", "w8a8", "no", "run"),
        ("vLLM", "TeleChat2ForCausalLM", "w8a8-static", "no", "run"),
        ("vLLM", "TeleChat2ForCausalLM", "w8a8-dynamic", "yes", "run"),
        ("vLLM", "Glm4vForConditionalGeneration", "w8a8", "unknown", "not"),
        ("transformers", "Qwen3MoeForCausalLM", "w8a8-static", "no", "run"),
        ("vLLM-MindSpore", "LlamaForCausalLM", "w8a8-static", "yes", "run"),
        ("vLLM-MindSpore", "LlamaForCausalLM", "w8a8", "no", "run"),
        ("vLLM-MindSpore", "Qwen2ForCausalLM", "w8a8-static", "with a setting", "run"),
        ("vLLM-MindSpore", "Qwen3ForCausalLM", "w8a8-dynamic", "no", "run"),
        ("vLLM-MindSpore", "Qwen3MoeForCausalLM", "w8a8-static", "no", "run"),
        ("vLLM-MindSpore", "TeleChat2ForCausalLM", "w8a8-static", "no", "run"),
        ("vLLM-MindSpore", "DeepseekV3ForCausalLM", "w8a8", "yes", "run"),
        ("vLLM-MindSpore", "MixtralForCausalLM", "w8a8", "no", "read"),
        ("vllm-ascend", "MixtralForCausalLM", "w8a8", "no", "run"),
        ("vllm-ascend", "Qwen3MoeForCausalLM", "w8a8", "yes", "run"),
        ("SGLang", "LlamaForCausalLM", "w8a8-dynamic", "yes", "run"),
        ("SGLang", "LlamaForCausalLM", "w8a8", "no", "run"),
        ("SGLang", "Qwen3MoeForCausalLM", "w8a8-dynamic", "no", "run"),
        ("vllm-ascend", "LlamaForCausalLM in float32", "w8a8-static", "no", "read"),
    ],
)
def test_rows(runtime: str, model: str, scheme: str, answer: str, checked: str) -> None:
    reads = [reads.format for known in facts.KNOWN if known.title == runtime for reads in known.reads]
    found = rows(runtime, model, scheme)[next(format for format in reads if format != "float")]
    assert (found.answer, found.checked) == (answer, checked)
    assert bool(found.why) == (answer in ("no", "with a setting"))
    if checked == "read":
        assert found.source


def test_the_command_prints_them(run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("runtimes", "--json")
    assert done.code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert len(printed) == len(table.rows())
    assert {each["format"] for each in printed} == set(formats.NAMES)


def test_what_can_serve_a_float_model(run_qtool: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Each is what quantize says: where the answer is yes it makes the checkpoint, without a warning."""
    model = families.make(tmp_path / "model", "qwen3", tiny_tokenizer)
    done = run_qtool("runtimes", model, "--json")
    assert done.code == 0, done.stderr
    ways = json.loads(done.stdout)
    as_it_is = [way for way in ways if not way["scheme"]]
    assert {way["format"] for way in as_it_is} == {"float"}
    assert {way["runtime"] for way in as_it_is} == {runtime.title for runtime in facts.KNOWN}
    found = {(way["format"], way["scheme"]): way for way in ways if way["runtime"] not in ("transformers", "SGLang")}
    sglang = {way["scheme"]: way for way in ways if way["runtime"] == "SGLang"}
    assert {scheme: sglang[scheme]["answer"] for scheme in table.SCHEMES} == {
        "w8a8": "no",
        "w8a8-dynamic": "yes",
        "w8a8-static": "no",
    }
    assert sglang["w8a8-dynamic"]["how"].endswith("| xargs python -m sglang.launch_server --model-path")
    noise, static = found["golden-stick", "w8a8"], found["golden-stick", "w8a8-static"]
    assert (noise["answer"], noise["how"]) == ("no", "")
    assert "doesn't load their scales" in noise["why"]
    assert static["answer"] == "yes"
    assert static["how"].endswith("--scheme w8a8-static --format golden-stick | qtool serve - --runtime vllm-mindspore")
    for way in (noise, static):
        options = ("--scheme", way["scheme"], "--format", way["format"], "--dry-run", "--engine", "native")
        made = run_qtool("quantize", model, *options)
        assert made.code == (2 if way["answer"] == "no" else 0), made.stderr
        if way["answer"] == "no":
            assert way["why"].partition(") ")[2] in made.stderr  # which layer is named first may differ
        else:
            warnings = [line for line in made.stderr.splitlines() if line.startswith("warning")]
            assert [line for line in warnings if "stay float" not in line] == []  # what the recipe says is said


def test_what_can_serve_a_quantized_model(run_qtool: Callable[..., Any], quantize_tiny: Callable[..., Path]) -> None:
    model = quantize_tiny("w8a8-static")
    ways = json.loads(run_qtool("runtimes", "-", "--json", stdin=f"{model}\n").stdout)
    assert [way["format"] for way in ways] == [*["compressed-tensors"] * 4, "golden-stick", "modelslim"]
    assert ways[0]["how"] == f"qtool serve {model} --runtime vllm"
    assert ways[1]["how"] == f"qtool generate {model} --runtime transformers"
    assert (ways[2]["runtime"], ways[2]["answer"], ways[2]["how"]) == ("vllm-ascend", "no", "")
    assert (ways[3]["runtime"], ways[3]["answer"], ways[3]["how"]) == ("SGLang", "no", "")
    assert ways[4]["how"] == f"qtool convert {model} --to golden-stick | qtool serve - --runtime vllm-mindspore"
    assert json.loads(run_qtool("inspect", model, "--json").stdout)["runtimes"] == ways[:4]
    shown = run_qtool("inspect", model)
    assert "SGLang 0.5.23" in shown.stdout
    assert "dynamic int8 throughout" in " ".join(shown.stdout.split())
    model = quantize_tiny("w8a8-dynamic")
    ways = json.loads(run_qtool("runtimes", model, "--json").stdout)
    assert [way["answer"] for way in ways if way["format"] == "golden-stick"] == ["no"]
    assert Checkpoint.open(model).config["architectures"] == ["LlamaForCausalLM"]


@pytest.fixture
def quantize_tiny(run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> Callable[[str], Path]:
    def quantize(scheme: str) -> Path:
        output = tmp_path / scheme
        size = ("--samples", 2, "--seq-len", 32, "--engine", "native")
        done = run_qtool("quantize", tiny_llama, "--output", output, "--scheme", scheme, *size)
        assert done.code == 0, done.stderr
        return output

    return quantize


def test_no_such_model(run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    done = run_qtool("runtimes", tmp_path / "nowhere")
    assert done.code == 2
    assert "nowhere" in done.stderr
