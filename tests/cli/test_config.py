"""The configuration file and the variables that give options their defaults, and `qtool config`, which shows them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qtool.cli import schema
from tests.conftest import Finished

SOME = """\
[quantize]
samples = 3
seq-len = 24

[generate]
chat = true
stop = ["a", "b"]

[env.install]
dry-run = true
"""
Configured = Callable[..., Finished]


@pytest.fixture
def configured(run_qtool: Callable[..., Finished], tmp_path: Path) -> Configured:
    """configured(text, *args, env={}) -> the command, with this configuration file."""

    def run(text: str, *args: object, env: dict[str, str] | None = None) -> Finished:
        file = tmp_path / "config.toml"
        file.write_text(text)
        return run_qtool(*args, env={"QTOOL_CONFIG": str(file), **(env or {})}, cwd=tmp_path)

    return run


def test_the_order(configured: Configured, tiny_llama: Path) -> None:
    """Command line, variable, file, built in: each wins over what comes after it."""

    def calibration(*options: str, env: dict[str, str] | None = None) -> tuple[int, int]:
        done = configured(SOME, "quantize", tiny_llama, "--dry-run", "--json", "-o", "made", *options, env=env)
        assert done.code == 0, done.stderr
        used = json.loads(done.stdout)["calibration"]
        return used["samples"], used["seq_len"]

    assert calibration() == (3, 24)
    assert calibration(env={"QTOOL_QUANTIZE_SAMPLES": "5"}) == (5, 24)
    assert calibration("--samples", "6", env={"QTOOL_QUANTIZE_SAMPLES": "5"}) == (6, 24)


def test_what_is_in_force_is_shown(configured: Configured, tmp_path: Path) -> None:
    done = configured(SOME, "config", "--json", env={"QTOOL_QUANTIZE_SAMPLES": "5"})
    found = json.loads(done.stdout)
    rows = [(row["command"], row["option"], row["value"], row["source"]) for row in found["values"]]
    file = tmp_path / "config.toml"
    assert (found["file"], found["exists"]) == (str(file), True)
    assert rows == [
        ("quantize", "samples", "5", "QTOOL_QUANTIZE_SAMPLES"),
        ("quantize", "seq-len", 24, f"{file}, line 3"),
        ("generate", "chat", True, f"{file}, line 6"),
        ("generate", "stop", ["a", "b"], f"{file}, line 7"),
        ("env install", "dry-run", True, f"{file}, line 10"),
    ]
    assert "│ generate    │ chat" in configured(SOME, "config").stdout
    shown = re.sub(r"\s+", " ", configured(SOME, "quantize", "--help").stdout)
    assert "(default: 24, by your configuration)" in shown


def test_without_a_file(run_qtool: Callable[..., Finished], tmp_path: Path) -> None:
    done = run_qtool("config", env={"XDG_CONFIG_HOME": str(tmp_path)})
    assert (done.code, done.stdout) == (0, "")
    assert f"{tmp_path / 'qtool' / 'config.toml'} (there is none)" in done.stderr
    done = run_qtool("env", "vars", env={"QTOOL_CONFIG": str(tmp_path / "none.toml")})
    assert done.code == 2
    assert "no such configuration file" in done.stderr


WRONG = {
    "[quantise]\nsamples = 3": (1, "no command 'quantise'", "Did you mean quantize?"),
    "samples = 3": (1, "no command 'samples'", r"\[quantize\]"),
    "[quantize]\n\nsample = 3": (3, "qtool quantize has no option 'sample'", "Did you mean samples?"),
    '[quantize]\nsamples = "3"': (2, "samples is '3'", "Write a whole number, at least 1"),
    "[quantize]\nsamples = 0": (2, "samples is 0", "at least 1"),
    "[quantize]\nsamples = true": (2, "samples is True", "a whole number"),
    'quantize.format = "gs"': (1, "format is 'gs'", "compressed-tensors|golden-stick"),
    "[quantize]\noverwrite = 1": (2, "overwrite is 1", "true or false"),
    "quantize = 1": (1, "quantize is not a table", r"\[quantize\]"),
    "[env]\nlist = 1": (2, "list is not a table", r"\[env.list\]"),
    "[env]\nuninstall = 1": (2, "qtool env has no command 'uninstall'", "install"),
    '[generate]\nstop = "a"': (2, "stop is 'a'", "a list of texts"),
    "[generate]\ntemperature = -3": (2, "temperature is -3", "at least 0"),
    '[environments]\ngolden = "/bin/sh"': (2, "unknown engine 'golden'", "golden-stick"),
    "[environments]\ngolden-stick = 3": (2, "not a path in quotes", ""),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_an_error_with_its_line(configured: Configured, tmp_path: Path, text: str) -> None:
    line, message, hint = WRONG[text]
    done = configured(text, "config")
    assert (done.code, done.stdout) == (2, ""), done
    assert message in done.stderr
    assert f"{tmp_path / 'config.toml'}, line {line}" in done.stderr
    assert re.search(hint.replace("|", r"\|"), done.stderr), done.stderr
    with pytest.raises(jsonschema.ValidationError):
        _validate(text)


def test_a_command_refuses_its_own_table_and_doctor_tells_of_all(configured: Configured, tmp_path: Path) -> None:
    wrong = "[inspect]\ntensor = true\n"
    done = configured(wrong, "inspect", tmp_path, "--json")
    assert done.code == 2
    assert json.loads(done.stdout)["error"]["where"] == f"{tmp_path / 'config.toml'}, line 2"
    assert configured(wrong, "recipes", "list").code == 0
    report = json.loads(configured(wrong, "doctor", "--json").stdout)
    assert "qtool inspect has no option 'tensor'" in report["configuration"]["problem"]


def test_the_schema_takes_what_commands_take() -> None:
    _validate(SOME)


def _validate(text: str) -> Any:
    return jsonschema.Draft202012Validator(schema.json_schema("configuration")).validate(tomllib.loads(text))
