"""The model card, whatever qtool.json and the original's README hold."""

from __future__ import annotations

import pytest
import yaml

from qtool.hub.card import card, front_matter


def test_a_bare_report_is_enough() -> None:
    text = card("name", {}, "")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"pipeline_tag": "text-generation", "tags": ["qtool", "w8a8"]}
    assert "\n# name\n" in text


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
