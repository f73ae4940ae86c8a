"""`qtool recipes list|show|validate` as processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        f"{bad}:5: calibration.samples: should be a valid integer, unable to parse string as an integer, not 'none'",
        f"{missing}: no such recipe file",
    ]
    assert run_qtool("recipes", "validate", good).code == 0


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
