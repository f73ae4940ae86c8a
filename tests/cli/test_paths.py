"""Paths that can't even be looked at: every command that takes one says so, and never that it has a bug."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtool.cli import app
from tests.cli.test_bad_input import WITHOUT_PRIVILEGES

ROOT = Path(__file__).resolve().parents[2]
LONG_NAME = "x" * 300
LONG_PATH = "/".join(["y" * 200] * 30)
NO_HOME = "~no-such-user-here/model"


def commands(path: str, model: str, out: str) -> Iterator[list[str]]:
    quantize = ["quantize", model, "-o", out]
    yield ["quantize", path]
    yield ["quantize", model, "-o", path]
    yield ["quantize", model, "-o", f"{path}/out"]
    yield [*quantize, "--recipe", f"{path}.yaml"]
    yield ["generate", path, "-p", "x"]
    yield ["generate", model, path, "--runtime", "transformers"]
    yield ["generate", model, "-p", "x", "-o", path, "--runtime", "transformers"]
    yield ["serve", path]
    yield ["eval", path, model]
    yield ["eval", model, model, "--report", path]
    yield ["eval", model, model, "--report", f"{path}/page.html"]
    yield ["eval", model, "--tasks", "piqa", "--data", path]
    yield ["analyze", path]
    yield ["tune", path, "--max-kl", "1"]
    yield ["tune", model, "--max-kl", "1", "--output", path]
    yield ["tune", model, "--max-kl", "1", "--scratch", path]
    yield ["inspect", path]
    yield ["convert", path, "--to", "modelslim"]
    yield ["convert", f"{path}.gguf", "-o", out]
    yield ["run", f"{path}.yaml"]
    yield ["run", "default", path]
    yield ["run", "default", model, "--work", path]
    yield ["download", path]
    yield ["download", "some/model", "--from", "huggingface", "--token-file", path]
    yield ["download", "some/model", "--to", path]
    yield ["download", "--verify", path]
    yield ["upload", path, "some/model"]
    yield ["recipes", "show", f"{path}.yaml"]
    yield ["recipes", "validate", f"{path}.yaml"]
    yield ["env", "install", "vllm", "--python", path]


@pytest.mark.parametrize("path", [LONG_NAME, LONG_PATH, NO_HOME])
def test_paths_that_cannot_be(
    path: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    wrong = []
    for command in commands(path, str(tiny_llama), str(tmp_path / "out")):
        code = app.run(command)
        said = capsys.readouterr()
        if code != 2 or said.out or "bug in qtool" in said.err or "Traceback" in said.err:
            wrong.append((command, code, said.err[-300:]))
    assert wrong == []
    assert [left.name for left in tmp_path.iterdir() if left.name != "state"] == []


FOLDERS = {"closed": 0o000, "unreadable": 0o111, "unenterable": 0o444}
WALK = """
import contextlib, io, json, os, sys
from tests.cli.test_paths import commands
from qtool.cli import app

wrong = []
for folder in sys.argv[2:]:
    for command in commands(folder, sys.argv[1], "out"):
        if "env" in command or "tune" in command[:1] and "--max-kl" in command and "--output" not in command:
            continue  # asks a Python, or starts to work
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = app.run(command)
        said = err.getvalue()
        if code != 2 or out.getvalue() or "bug in qtool" in said or "Traceback" in said:
            wrong.append([command, code, said[-300:]])
print(json.dumps(wrong))
"""


def test_folders_that_may_not_be_used(tiny_llama: Path, tmp_path: Path, qtool_environment: dict[str, str]) -> None:
    """Permissions count for this process, even when it is root's."""
    for name, mode in FOLDERS.items():
        shutil.copytree(tiny_llama, tmp_path / name)
        (tmp_path / name).chmod(mode)
    first = f"{WITHOUT_PRIVILEGES}\nimport os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", first, "-c", WALK, tiny_llama, *(tmp_path / name for name in FOLDERS)]
    env = {**qtool_environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert [*work.iterdir()] == []


def test_pipes_among_the_weights(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading a pipe that nobody writes to would wait for ever."""
    from qtool.runtimes import identity

    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_llama.iterdir():
        (model / file.name).symlink_to(file)
    os.mkfifo(model / "extra.safetensors")
    assert identity.fingerprint(model) == identity.fingerprint(tiny_llama)
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"):
        aside = model / "aside"
        if (file := model / name).exists():
            file.rename(aside)
        os.mkfifo(file)
        code = app.run(["inspect", str(model)])
        said = capsys.readouterr()
        assert "bug in qtool" not in said.err
        assert code in (0, 2)
        file.unlink()
        if aside.is_symlink():
            aside.rename(file)
