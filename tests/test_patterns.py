"""Patterns of strangers: as `re` matches them, and never for ever."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import patterns
from qtool.errors import InputError

NAME = "model.layers.10.mlp.experts.117.down_proj"

parts = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "a*",
        "b+?",
        ".*",
        "a?",
        "(a|b)",
        "(a|ab)*",
        "(b+)+",
        "a{1,3}",
        "(?!ab)",
        "(?=a)",
        r"\w",
        "[ab]",
    ]
)


@settings(max_examples=200, deadline=None)
@given(pattern=st.lists(parts, max_size=6).map("".join), text=st.text("ab.", max_size=8))
def test_they_mean_what_python_means(pattern: str, text: str) -> None:
    for how in ("match", "fullmatch", "search"):
        found = getattr(patterns, how)(pattern, text, where="here")
        assert found == (getattr(re, how)(pattern, text) is not None)


@pytest.mark.parametrize("pattern", [r"(\w+\.?)*!", "a?" * 60 + "a" * 60])
def test_one_that_takes_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="takes too long to match") as raised:
        patterns.search(pattern, "a" * 60 if pattern.startswith("a") else NAME, where="recipe r")
    assert raised.value.where == "recipe r"
    with pytest.raises(InputError, match="takes too long"):  # it has had its time: no other name gets some
        patterns.search(pattern, "x", where="recipe r")
    assert patterns.fullmatch(r".*(\.\w+)+_proj", NAME, where="")  # the next pattern has a process again


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(" * 5000 + ")" * 5000, "nested"), ("[", "unterminated"), ("a" * 30_000, "at most 20,000")],
)
def test_what_is_no_pattern_says_why(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        patterns.check(pattern)


def test_usual_ones_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.recipe import load

    def refuse(*_: object) -> None:
        pytest.fail("a process was asked")

    monkeypatch.setattr(patterns._matcher, "ask", refuse)
    for name in load.names():
        recipe = load.load(name)
        for scheme in recipe.schemes:
            recipe.policy(scheme, NAME)
    assert patterns.match(r".*\.layers\.(0|1|2|3)\.mlp\.experts\.[0-9]+\.up_proj$", f"{NAME}", where="") is False


def test_on_the_command_line(tiny_llama: Path, tmp_path: Path, run_qtool: Callable[..., Any]) -> None:
    filtered = run_qtool("inspect", tiny_llama, "--tensors", "--filter", r"((\w+\.?)*)*!")
    assert (filtered.code, filtered.stdout) == (2, "")
    assert "takes too long" in filtered.stderr
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ndescription: d\nschemes: {w8a8: [{layers: '((\\w+\\.?)*)*!'}]}\n")
    quantized = run_qtool("quantize", tiny_llama, "--recipe", recipe, "--dry-run", "-o", tmp_path / "out")
    assert quantized.code == 2, quantized.stderr
    assert "takes too long" in quantized.stderr
    assert "recipe r, scheme w8a8" in quantized.stderr
