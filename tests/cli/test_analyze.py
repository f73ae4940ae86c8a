"""qtool analyze, run as a user would."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import Launcher

SMALL = ("--windows", "2", "--length", "32", "--samples", "4", "--seq-len", "64")


def test_every_linear_ranked(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("analyze", "-", *SMALL, "--json", stdin=f"{tiny_llama}\n")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    linears = result["linears"]
    assert len({linear["name"] for linear in linears}) == len(linears) == 14
    assert "model.layers.1.self_attn.o_proj" in {linear["name"] for linear in linears}
    divergences = [linear["kl"] for linear in linears]
    assert divergences == sorted(divergences, reverse=True)
    assert all(linear["kl"] > 0 and linear["relative_error"] > 0 for linear in linears)
    assert {linear["activations"] for linear in linears} == {"static", "dynamic"}  # as the default scheme has it
    assert (result["recipe"], result["scheme"]) == ("default", "w8a8")
    assert result["text"]["windows"] == 2


def test_a_table_on_a_terminal(tiny_llama: Path, qtool_environment: dict[str, str], launcher: Launcher) -> None:
    master, slave = pty.openpty()
    command = ["analyze", tiny_llama, *SMALL, "--top", "3"]
    done = launcher.run(command, stdout=slave, stderr=subprocess.PIPE, env=qtool_environment, timeout=300)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0, done.stderr
    assert shown.count("_proj") == 3  # whole names, on 80 columns
    assert "linear in model.layers" in shown
    assert "11 more: --top 0 shows all" in done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{missing}",), "no such folder"),
        (("{model}", "--scheme", "w4a4"), "no scheme 'w4a4'"),
        (("{model}", "--recipe", "nonesuch"), "no recipe is named"),
        (("{model}", "--text", "{missing}.txt"), "no such text file"),
        (("{model}", "--length", "4096"), "context is 512"),
    ],
)
def test_bad_input(
    tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run_qtool("analyze", *(each.format(model=tiny_llama, missing=tmp_path / "no") for each in arguments))
    assert done.code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_a_quantized_model_is_refused(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    small = ("--samples", "4", "--seq-len", "64")
    assert run_qtool("quantize", tiny_llama, "--output", tmp_path / "model", *small).code == 0
    done = run_qtool("analyze", tmp_path / "model")
    assert done.code == 2
    assert "already quantized" in done.stderr
