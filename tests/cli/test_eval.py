"""qtool eval, run as a user would."""

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

FIGURES = ("base_perplexity", "quantized_perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement")
SMALL = ("--windows", "2", "--length", "32")


def test_json_when_piped(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("eval", tiny_llama, "-", *SMALL, stdin=f"{tiny_llama}\n")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kl_divergence"]["value"] == 0
    assert result["top1_agreement"]["value"] == 1
    assert all(result[name]["low"] <= result[name]["value"] <= result[name]["high"] for name in FIGURES)
    assert result["base"] == result["quantized"] == str(tiny_llama)
    assert (result["text"]["windows"], result["text"]["length"]) == (2, 32)
    assert "held-out" in result["text"]["source"]
    assert "peak memory" in done.stderr
    assert "0.00000 to 0.00000" in done.stderr  # the table, for whoever watches


def test_quiet(tiny_llama: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("eval", tiny_llama, tiny_llama, *SMALL, "--quiet", "--json")
    assert done.code == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["kl_divergence"]["value"] == 0


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_a_table_on_a_terminal(
    tiny_llama: Path, qtool_environment: dict[str, str], launcher: Launcher, options: tuple[str, ...]
) -> None:
    master, slave = pty.openpty()
    command = ["eval", tiny_llama, tiny_llama, *SMALL, *options]
    done = launcher.run(command, stdout=slave, stderr=subprocess.PIPE, env=qtool_environment, timeout=300)
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # Linux's way of saying that all is read
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert done.returncode == 0, done.stderr
    text = shown.decode()
    for expected in (
        "perplexity, base",
        "KL divergence",
        "0.00000 to 0.00000",
        "100.00%",
        "95 % interval",
        "99th percentile",
        "top-5 agreement",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}", "{empty}"), "no config.json"),
        (("{missing}", "{model}"), "no such folder"),
        (("{model}", "{model}", "--text", "{missing}.txt"), "no such text file"),
        (("{model}", "{model}", "--text", "{model}"), "unknown kind of text"),
        (("{model}", "{model}", "--windows", "100000"), "too little text"),
        (("{model}", "{model}", "--length", "1"), "--length"),
    ],
)
def test_bad_input(
    tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"model": tiny_llama, "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    done = run_qtool("eval", *(argument.format(**places) for argument in arguments))
    assert done.code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
