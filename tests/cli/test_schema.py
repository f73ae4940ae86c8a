"""`qtool schema`, and real outputs against what it prints. `run_qtool` checks all JSON that any test asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qtool.cli import app, schema
from qtool.errors import InputError
from tests import outputs

SMALL = ("--samples", "4", "--seq-len", "64")
TEXT = ("--windows", "2", "--length", "32")

# What needs a hub, or minutes, is run by the tests of its command.
ELSEWHERE = {"download", "upload", "run", "tune", "eval-tasks", "doctor", "recipe", "configuration", "error"}


def commands(model: Path, made: Path, folder: Path) -> dict[str, list[Any]]:
    return {
        "quantize-dry-run": ["quantize", model, "-o", folder / "new", "--dry-run", *SMALL],
        "eval": ["eval", model, made, *TEXT],
        "analyze": ["analyze", model, *TEXT, *SMALL],
        "inspect": ["inspect", made],
        "inspect-tensors": ["inspect", made, "--tensors"],
        "convert": ["convert", made, "--to", "modelslim", "-o", folder / "modelslim"],
        "generate": ["generate", model, "-p", "I am", "--max-tokens", "3", "--runtime", "transformers"],
        "runtimes": ["runtimes"],
        "runtimes-model": ["runtimes", model],
        "recipes-list": ["recipes", "list"],
        "recipes-validate": ["recipes", "validate", "default", folder / "missing.yaml"],
        "config": ["config"],
        "env-list": ["env", "list"],
        "env-vars": ["env", "vars"],
    }


@pytest.fixture(scope="module")
def made(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schema") / "made"
    done = run_qtool("quantize", tiny_llama, "-o", folder, *SMALL, "--json")
    assert done.code == 0, done.stderr
    assert outputs.check(["quantize", "--json"], done.stdout) == "quantize"
    return folder


def test_real_outputs_fit(made: Path, tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    wanted = commands(tiny_llama, made, tmp_path)
    assert {*wanted, "quantize"} | ELSEWHERE == set(schema.names())
    for name, command in wanted.items():
        done = run_qtool(*command, "--json")
        assert done.code == (2 if name == "recipes-validate" else 0), done.stderr
        assert outputs.check([*command, "--json"], done.stdout) == name


def test_a_wrong_output_does_not_fit() -> None:
    """The check itself: a key too many, one too few, one of another type."""
    good = {"error": {"code": "input", "message": "m", "where": None, "hint": None}}
    outputs.validator("error").validate(good)
    for wrong in ({"code": "odd"}, {"more": 1}, {"message": None}):
        with pytest.raises(jsonschema.ValidationError):
            outputs.validator("error").validate({"error": good["error"] | wrong})
    with pytest.raises(jsonschema.ValidationError):
        outputs.validator("error").validate({"error": {"code": "input"}})


@pytest.mark.parametrize("name", schema.names())
def test_each_is_a_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.json_schema(name))


def test_every_command_has_one() -> None:
    known = {name.partition("-")[0] for name in schema.names()}
    assert set(app.COMMANDS) - known <= {"chat", "serve", "schema"}


def test_the_command(run_qtool: Callable[..., Any]) -> None:
    assert run_qtool("schema").stdout.split() == schema.names()
    assert json.loads(run_qtool("schema", "eval").stdout) == schema.json_schema("eval")
    wrong = run_qtool("schema", "evil")
    assert (wrong.code, wrong.stdout) == (2, "")
    assert "recipe, configuration, error, eval" in wrong.stderr
    with pytest.raises(InputError):
        schema.json_schema("evil")
