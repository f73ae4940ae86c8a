"""The JSON Schema says the same of a recipe's text as loading it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qtool.errors import InputError
from qtool.recipe import editors, load

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(editors.json_schema())
BEGIN = "name: mine\ndescription: mine\ndefault_scheme: s\n"


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(editors.json_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_fits(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    VALIDATOR.validate(yaml.safe_load(load.resolved(path)))


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("schemes: {s: [{layers: .*}]}", True),
        ("schemes: {s: [{layers: .*, activations: static, smoothing: osl, rounding: nearest}]}", True),
        ("schemes: {s: [{layers: .*, scheme: W8A8-dynamic}]}", True),
        ("schemes: {s: [{layers: .*, activations: {mode: static, observer: percentile}}]}", True),
        ("schemes: {s: [{layers: .*, smoothing: {method: smoothquant, alpha: 0.3}}]}", True),
        ("schemes: {s: [{layers: .*, activations: {}}]}", True),
        ("", False),
        ("schemes: {}", False),
        ("schemes: {s: [{layers: .*, scheme: W8A7}]}", False),
        ("schemes: {s: [{layers: .*, smoothing: awq}]}", False),
        ("schemes: {s: [{layers: .*, smoothing: {alpha: 0.3}}]}", False),
        ("schemes: {s: [{layers: .*, smoothing: {method: osl, alpha: 0.3}}]}", False),
        ("schemes: {s: [{layers: .*, zebra: 1}]}", False),
        ("schemes: {s: [{layers: [1]}]}", False),
        ("schemes: {s: [{layers: .*}]}\nexprot: {}", False),
        ("schemes: {s: [{layers: .*}]}\ncalibration: {samples: 0}", False),
        ("schemes: {s: [{layers: .*}]}\nexport: {format: gguf}", False),
    ],
)
def test_it_agrees_with_the_loader(tmp_path: Path, text: str, valid: bool) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BEGIN + text, encoding="utf-8")
    data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert VALIDATOR.is_valid(data) == valid
    try:
        load.load(path)
        loads = True
    except InputError:
        loads = False
    assert loads == valid


def test_a_recipe_that_extends_needs_no_schemes() -> None:
    data = {"extends": "default", "name": "mine", "description": "mine"}
    VALIDATOR.validate(data)
    assert not VALIDATOR.is_valid(data | {"extends": 3})
