"""qtool eval, run as a user would."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import Launcher

FIGURES = ("base_perplexity", "quantized_perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement")
SMALL = ("--windows", "2", "--length", "32")


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "tiny-w8a8"
    done = run_qtool("quantize", tiny_llama, "--output", folder, "--samples", "4", "--seq-len", "64")
    assert done.code == 0, done.stderr
    return folder


def test_json(tiny_llama: Path, quantized: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("eval", tiny_llama, "-", *SMALL, "--json", stdin=f"{quantized}\n")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["kl_divergence"]["value"] < 0.01
    assert 0.9 < result["top1_agreement"]["value"] <= 1
    assert all(result[name]["low"] <= result[name]["value"] <= result[name]["high"] for name in FIGURES)
    assert (result["base"], result["quantized"]) == (str(tiny_llama), str(quantized))
    assert (result["text"]["windows"], result["text"]["length"]) == (2, 32)
    assert "held-out" in result["text"]["source"]
    assert "peak memory" in done.stderr
    kl = result["kl_divergence"]
    assert f"{kl['low']:.5f} to {kl['high']:.5f}" in done.stderr  # the table, for whoever watches


def test_quiet(tiny_llama: Path, quantized: Path, run_qtool: Callable[..., Any]) -> None:
    done = run_qtool("eval", tiny_llama, quantized, *SMALL, "--quiet", "--json")
    assert done.code == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["kl_divergence"]["value"] > 0


def test_several(tiny_llama: Path, quantized: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / "tiny-dynamic"
    done = run_qtool(
        *("quantize", tiny_llama, "--output", other, "--samples", "4", "--seq-len", "64", "--scheme", "w8a8-dynamic")
    )
    assert done.code == 0, done.stderr
    done = run_qtool("eval", tiny_llama, quantized, "-", *SMALL, "--json", stdin=f"{other}\n")
    assert done.code == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert (first["quantized"], second["quantized"]) == (str(quantized), str(other))
    assert first["base_perplexity"] == second["base_perplexity"]
    assert first["kl_divergence"] != second["kl_divergence"]
    for folder, found in ((quantized, first), (other, second)):
        assert json.loads((folder / "qtool.json").read_text())["evaluation"]["kl_divergence"] == found["kl_divergence"]
        (row,) = [line for line in done.stderr.splitlines() if folder.name in line and " kB " in line]
        assert f"{found['kl_divergence']['value']:.5f}" in row
    best = min((first, second), key=lambda found: found["kl_divergence"]["value"])
    assert f"{Path(best['quantized']).name} is nearest to tiny-llama" in done.stderr


def test_folders_that_cant_be_compared_are_refused_at_once(
    tiny_llama: Path, quantized: Path, make_model: Callable[..., Path], run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    """Nothing is run: the text, which doesn't exist, isn't looked for."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    other = make_model("llama", name="wider", hidden_size=32)
    for pair, message in (
        ((quantized, tiny_llama), "the original model comes first"),
        ((tiny_llama, tiny_llama), "the original model itself"),
        ((tiny_llama, copy), "the original model itself"),
        ((tiny_llama, tmp_path / "link"), "the original model itself"),
        ((tiny_llama, other), "different models: hidden_size is 64 and 32"),
        ((tiny_llama, quantized, quantized), "the same model as another one"),
    ):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tiny_llama)
        done = run_qtool("eval", *pair, "--text", tmp_path / "missing.txt")
        assert (done.code, done.stdout) == (2, "")
        assert message in done.stderr
        assert "missing.txt" not in done.stderr


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_a_table_on_a_terminal(
    tiny_llama: Path,
    quantized: Path,
    qtool_environment: dict[str, str],
    launcher: Launcher,
    options: tuple[str, ...],
) -> None:
    master, slave = pty.openpty()
    command = ["eval", tiny_llama, quantized, *SMALL, *options]
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
        (("{model}", "{quantized}", "--text", "{missing}.txt"), "no such text file"),
        (("{model}", "{quantized}", "--text", "{model}"), "unknown kind of text"),
        (("{model}", "{quantized}", "--windows", "100000"), "too little text"),
        (("{model}", "{quantized}", "--length", "1"), "--length"),
    ],
)
def test_bad_input(
    tiny_llama: Path,
    quantized: Path,
    run_qtool: Callable[..., Any],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"model": tiny_llama, "quantized": quantized, "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    done = run_qtool("eval", *(argument.format(**places) for argument in arguments))
    assert done.code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
