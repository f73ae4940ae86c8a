"""`qtool recipes list|show|validate` as processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.recipe import load

BAD = "extends: default\nname: bad\ndescripton: x\ncalibration:\n  samples: none\n"


def test_list(run_qtool: Any) -> None:
    done = run_qtool("recipes", "list")
    assert (done.code, done.stdout.split(), done.stderr) == (0, load.names(), "")


def test_list_json(run_qtool: Any) -> None:
    done = run_qtool("recipes", "list", "--json")
    listed = {recipe["name"]: recipe for recipe in json.loads(done.stdout)}
    assert done.code == 0
    assert sorted(listed) == load.names()
    assert listed["smollm2"]["match"]["config"]["vocab_size"] == 49152
    assert listed["smollm2"]["schemes"] == ["w8a8", "w8a8-dynamic", "w8a8-static"]


def test_show_prints_yaml_that_is_a_recipe_itself(run_qtool: Any, tmp_path: Path) -> None:
    done = run_qtool("recipes", "show", "qwen3")
    assert done.code == 0
    assert yaml.safe_load(done.stdout)["match"] == {"model_type": ["qwen3"]}
    path = tmp_path / "mine.yaml"
    path.write_text(done.stdout)
    assert load.load(path) == load.load("qwen3")
    as_json = run_qtool("recipes", "show", str(path), "--json")
    assert json.loads(as_json.stdout) == load.load("qwen3").model_dump(mode="json")


def test_show_of_a_wrong_name(run_qtool: Any) -> None:
    done = run_qtool("recipes", "show", "qwen-3")
    assert (done.code, done.stdout) == (2, "")
    assert "did you mean 'qwen3'?" in done.stderr


def test_validate_prints_every_problem(run_qtool: Any, tmp_path: Path) -> None:
    bad, good, missing = tmp_path / "bad.yaml", tmp_path / "good.yaml", tmp_path / "missing.yaml"
    bad.write_text(BAD)
    good.write_text("extends: default\nname: good\ndescription: good\n")
    done = run_qtool("recipes", "validate", bad, good, missing)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{good}: valid (good: w8a8, w8a8-dynamic, w8a8-static)",
        f"{bad}:1: description: is missing",
        f"{bad}:3: descripton: unknown key; did you mean 'description'?",
        f"{bad}:5: calibration.samples: must be a whole number, not 'none'",
        f"{missing}: no such recipe file",
    ]
    assert run_qtool("recipes", "validate", good).code == 0


def test_validate_looks_for_the_texts(run_qtool: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    text = "extends: default\nname: mine\ndescription: mine\ncalibration:\n  data: {}\neval: {{text: {}}}\n"
    recipe.write_text(text.format("gone.txt", "page.html"))
    done = run_qtool("recipes", "validate", "mine.yaml", cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "mine.yaml:5: calibration.data: no such text file: gone.txt",
        "mine.yaml:6: eval.text: unknown kind of text: page.html",
    ]
    (tmp_path / "there.txt").write_text("text")
    recipe.write_text(text.format("self", "there.txt"))
    assert run_qtool("recipes", "validate", "mine.yaml", cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("qtool quantize model --recipe smol", "smollm2"),
        ("qtool quantize model --scheme w8a8-s", "w8a8-static"),
        ("qtool quantize model --recipe golden-stick-osl --scheme w8a8-", ""),
        ("qtool tune model --recipe qwen3-m", "qwen3-moe"),
        ("qtool analyze model --scheme w8a8-d", "w8a8-dynamic"),
        ("qtool run smol", "smollm2"),
        ("qtool recipes show smol", "smollm2"),
    ],
)
def test_shells_complete_names(run_qtool: Any, typed: str, expected: str) -> None:
    words = typed.split()
    env = {"_QTOOL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    assert run_qtool(env=env).stdout.split() == expected.split()


def test_validate_json(run_qtool: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD)
    done = run_qtool("recipes", "validate", bad, "--json")
    (report,) = json.loads(done.stdout)
    assert (done.code, report["valid"]) == (2, False)
    assert [(p["line"], p["key"]) for p in report["problems"]] == [
        (1, "description"),
        (3, "descripton"),
        (5, "calibration.samples"),
    ]
