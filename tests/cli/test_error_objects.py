"""With --json an error is an object on standard output, whoever finds it and however the command ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qtool.cli import app, schema
from qtool.errors import Bug, ForeignError, InputError, Interrupted, QtoolError, UsageProblem, WorkerDied

KEYS = ["code", "message", "where", "hint"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "{missing}"), "input", "no such folder"),
        (("eval", "{model}", "{model}"), "input", "the original model itself"),
        (("quantize", "{model}", "--scheme", "nonesuch"), "input", "nonesuch"),
        (("generate", "{missing}", "-p", "x"), "input", "no such"),
        (("recipes", "show", "nonesuch"), "input", "no recipe is named"),
        (("env", "path", "nonesuch"), "input", "nonesuch"),
        (("inspect", "{model}", "--bogus"), "usage", "--bogus"),
        (("eval", "{model}", "x", "--windows", "none"), "usage", "--windows"),
        (("nonesuch",), "usage", "nonesuch"),
        (("convert",), "usage", "argument"),
    ],
)
def test_errors_of_commands(
    run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path, arguments: tuple[str, ...], code: str, message: str
) -> None:
    given = [each.format(model=tiny_llama, missing=tmp_path / "missing") for each in arguments]
    done = run_qtool(*given, "--json", cwd=tmp_path)
    assert done.code == 2
    found = json.loads(done.stdout)
    jsonschema.validate(found, schema.json_schema("error"))
    assert list(found) == ["error"]
    assert list(found["error"]) == KEYS
    assert found["error"]["code"] == code
    told = done.stderr.replace("\n", " ")
    assert message in " ".join(str(value) for value in found["error"].values())
    assert message in told  # a person is told as well
    assert run_qtool(*given, cwd=tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("raised", "code", "exit_code"),
    [
        (QtoolError("w", where="x", hint="h"), "failed", 1),
        (InputError("w", where="x", hint="h"), "input", 2),
        (ForeignError("w", where="x", hint="h"), "foreign", 2),
        (WorkerDied("w", where="x", hint="h"), "worker_died", 1),
        (KeyError("w"), "bug", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_every_kind_of_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: str,
    exit_code: int,
) -> None:
    def fail(path: str) -> None:
        raise raised

    monkeypatch.setattr("qtool.checkpoint.reader.Checkpoint.open", fail)
    assert app.run(["inspect", "somewhere", "--json"]) == exit_code
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["code"] == code
    if isinstance(raised, QtoolError):
        assert (found["message"], found["where"], found["hint"]) == ("w", "x", "h")
    jsonschema.validate({"error": found}, schema.json_schema("error"))


def test_the_codes_are_those_of_the_schema() -> None:
    kinds = (QtoolError, InputError, ForeignError, WorkerDied, UsageProblem, Interrupted, Bug)
    known = schema.json_schema("error")["$defs"]["ErrorObject"]["properties"]["code"]["enum"]
    assert sorted(kind.code for kind in kinds) == sorted(known)


def test_a_result_that_has_been_printed_stays_alone(run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    """Standard output is one JSON document: what is wrong after a result shows in the exit code and on stderr."""
    (tmp_path / "bad.yaml").write_text("name: bad\n")
    done = run_qtool("recipes", "validate", tmp_path / "bad.yaml", "--json")
    assert done.code == 2
    (report,) = json.loads(done.stdout)
    assert not report["valid"]
