"""The model card, whatever qtool.json and the original's README hold."""

from __future__ import annotations

import pytest
import yaml

from qtool.hub.card import card, front_matter
from qtool.runtimes.table import Answer, Way
from qtool.scheme import W8A8, W8A8_DYNAMIC, QuantizationArgs, Scheme

INT4 = QuantizationArgs(num_bits=4, strategy="group", group_size=32)


def test_a_bare_report_is_enough() -> None:
    text = card("name", {}, "")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"pipeline_tag": "text-generation", "tags": ["qtool"]}
    assert "\n# name\n" in text


@pytest.mark.parametrize(
    ("schemes", "tags", "words"),
    [
        ([W8A8, W8A8_DYNAMIC, W8A8], ["w8a8"], "`w`: 8-bit integer weights and activations |"),
        ([Scheme(INT4, None)], ["w4a16"], "`w`: 4-bit integer weights |"),
        ([Scheme(INT4, W8A8_DYNAMIC.activations)], ["w4a8"], "`w`: 4-bit integer weights, 8-bit integer activations |"),
    ],
)
def test_the_precision_is_the_checkpoints(schemes: list[Scheme], tags: list[str], words: str) -> None:
    text = card("name", {"scheme": "w", "format": "golden-stick"}, "", schemes)
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["qtool", *tags, "golden-stick"]
    assert words in text
    assert "for vLLM-MindSpore" in text


def test_who_runs_it_and_who_does_not() -> None:
    report = {"scheme": "w8a8", "format": "compressed-tensors"}
    answers: list[tuple[str, Answer, str]] = [
        ("vLLM", "no", "other names"),
        ("SGLang", "yes", ""),
        ("MLX", "unknown", ""),
    ]
    ways = [Way(name, "1.0", "compressed-tensors", "", answer, why, "", "", "read") for name, answer, why in answers]
    text = card("me/test", report, "", ways=ways)
    assert "| runs in | SGLang 1.0 |" in text
    assert "| does not run in | vLLM 1.0 (other names) |" in text
    assert "MLX" not in text
    assert "qtool generate me/test" in text
    assert "vllm serve" not in text
    assert "qtool generate" not in card("me/test", report, "", ways=ways[:1])


@pytest.mark.parametrize("readme", ["", "no matter", "---\n", "---\n: [\n---\n", "---\n- a list\n---\n", "---\n1\n"])
def test_a_readme_without_front_matter(readme: str) -> None:
    assert front_matter(readme) == {}


def test_of_the_originals_front_matter_only_licence_and_language_are_taken() -> None:
    readme = "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\npipeline_tag: other\nwidget: []\n---\n# x\n"
    front = yaml.safe_load(card("n", {}, readme).split("---\n")[1])
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "x", "LICENSE")
    assert front["pipeline_tag"] == "text-generation"
    assert "widget" not in front


def test_no_value_breaks_the_table() -> None:
    report = {"scheme": "a|b\nc", "source": "x\n\n| y |", "calibration": {"source": "t\n|", "samples": 1, "seq_len": 2}}
    rows = [line for line in card("n", report, "").splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


def test_the_title_and_the_usage_say_what_it_is() -> None:
    report = {"source": "SmolLM2-135M", "scheme": "w8a8", "format": "compressed-tensors"}
    text = card("me/test", report, "", [W8A8], license="apache-2.0")
    assert "\n# SmolLM2-135M, 8-bit integer weights and activations\n" in text
    assert 'qtool generate me/test --prompt "I am"\nvllm serve me/test\n' in text
    assert front_matter(text)["license"] == "apache-2.0"
    assert "base_model" not in front_matter(text)
    known = card("me/test", report | {"origin": {"repo": "org/base"}}, "---\nlicense: mit\n---\n", [W8A8])
    assert "\n# base, 8-bit" in known
    assert (front_matter(known)["license"], front_matter(known)["base_model"]) == ("mit", "org/base")


def test_how_keys_and_values_are_kept() -> None:
    report = {"format": "compressed-tensors", "scheme": "w8a8", "recipe": {"name": "default", "kv_cache": "fp8"}}
    assert "| keys and values | kept as `fp8` |" in card("me/tiny", report, "")
    assert "keys and values" not in card("me/tiny", report | {"recipe": {"name": "default", "kv_cache": None}}, "")
