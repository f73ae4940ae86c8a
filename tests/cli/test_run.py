"""`qtool run`: a recipe from a hub on loopback to generated text, interrupted and not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qtool.checkpoint import journal
from tests.cli.test_convert import write_gguf
from tests.hub.fixtures import Hub
from tests.hub.loopback import Repo
from tests.launcher import Launcher

RECIPE = """
extends: default
name: mine
description: all of it, as small as can be
{model}
default_scheme: w8a8-static
calibration: {{data: text.txt, samples: {samples}, seq_len: 16}}
export: {{also: {also}}}
eval: {{text: text.txt, windows: 2, length: 32}}
generate: {{max_tokens: {max_tokens}, prompts: [I am, Today is], temperature: 0.8, top_k: 20, seed: 5}}
"""
ON_A_HUB = "model: {hub: huggingface, repo: org/tiny}"
STAGES = ["quantize", "eval", "convert to golden-stick", "convert to bfloat16", "generate"]


def write_recipe(
    folder: Path, *, model: str = "", samples: int = 2, also: str = "[golden-stick, bfloat16]", max_tokens: int = 3
) -> Path:
    from pydoc_data.topics import topics

    (folder / "text.txt").write_text(topics["if"] * 3)
    file = folder / "mine.yaml"
    file.write_text(RECIPE.format(model=model, samples=samples, also=also, max_tokens=max_tokens))
    return file


def command(*arguments: str | Path) -> list[str]:
    return ["run", *map(str, arguments), "--engine", "native", "--runtime", "transformers"]


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its text, the model, and the finished job in `job`."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_llama, folder / "tiny")
    done = run_qtool(*command(write_recipe(folder), "tiny", "--work", "job"), cwd=folder)
    assert (done.code, done.stdout) == (0, f"{folder / 'job'}\n"), done.stderr
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path, run_qtool: Callable[..., Any]) -> Callable[..., dict[str, str]]:
    """again(**recipe) -> each stage's status, after a rerun in a copy of the finished job (in tmp_path/"here")."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)

    def run(**changes: Any) -> dict[str, str]:
        recipe = write_recipe(folder, **changes)
        done = run_qtool(*command(recipe, "tiny", "--work", "job", "--json"), cwd=folder)
        assert done.code == 0, done.stderr
        return {stage["name"]: stage["status"] for stage in json.loads(done.stdout)["stages"]}

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The files that a job makes, without what says when, how long, or where."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("qtool-run.json", "summary.md"):
            data = path.read_bytes().replace(str(folder).encode(), b"JOB")
            if path.suffix == ".json":
                data = re.sub(rb'"(seconds|peak_memory_bytes|date)": [^,\n}]*', b"", data)
            found[path.relative_to(folder).as_posix()] = data
    return found


# ------------------------------------------------------------------ what it makes


def test_everything_is_there_and_agrees(finished: Path, run_qtool: Callable[..., Any]) -> None:
    job = finished / "job"
    assert {path.name for path in job.iterdir()} == {
        "tiny-w8a8-static",
        "tiny-w8a8-static-golden-stick",
        "tiny-w8a8-static-bfloat16",
        "eval.json",
        "answers.jsonl",
        "summary.md",
        "qtool-run.json",
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    direct = load_file(job / "tiny-w8a8-static" / "model.safetensors")[name]
    assert direct.equal(
        load_file(job / "tiny-w8a8-static-golden-stick" / "quant-model-00001-of-00001.safetensors")[name]
    )
    report = json.loads((job / "tiny-w8a8-static" / "qtool.json").read_text())
    assert (report["scheme"], report["recipe"]["name"]) == ("w8a8-static", "mine")
    assert {key: report["calibration"][key] for key in ("source", "samples", "seq_len")} == {
        "source": "text.txt",
        "samples": 2,
        "seq_len": 16,
    }
    # the same commands by hand say the same
    size = ("--text", "text.txt", "--windows", "2", "--length", "32", "--json")
    by_hand = json.loads(run_qtool("eval", "tiny", job / "tiny-w8a8-static", *size, cwd=finished).stdout)
    evaluated = json.loads((job / "eval.json").read_text())
    for figure in ("base_perplexity", "quantized_perplexity", "kl_divergence", "top1_agreement"):
        assert by_hand[figure] == evaluated[figure]
    prompts = ("--prompt", "I am", "--prompt", "Today is", "--max-tokens", "3", "--runtime", "transformers")
    drawn = ("--temperature", "0.8", "--top-k", "20", "--seed", "5")
    answered = run_qtool("generate", job / "tiny-w8a8-static", *prompts, *drawn).stdout
    assert answered == (job / "answers.jsonl").read_text()


def test_the_page_has_the_figures(finished: Path) -> None:
    page = (finished / "job" / "summary.md").read_text()
    figures = json.loads((finished / "job" / "eval.json").read_text())
    assert f"{figures['kl_divergence']['value']:.5f}" in page
    assert f"{figures['quantized_perplexity']['value']:.3f}" in page
    assert "# tiny, recipe mine, scheme w8a8-static" in page
    for stage in STAGES:
        assert re.search(rf"^\| {stage} \| done \| [\d.]+ \|", page, re.MULTILINE)
    for line in (finished / "job" / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        assert f"```text\n{answer['prompt']}{answer['text']}\n```" in page


# ------------------------------------------------------------------ what is done again


def test_a_rerun_keeps_everything(again: Callable[..., dict[str, str]], finished: Path, tmp_path: Path) -> None:
    """Also in another place, and whatever the times of the files."""
    for number, path in enumerate(sorted((tmp_path / "here").rglob("*"))):
        os.utime(path, (number, 2_000_000_000 + number))
    before = contents(tmp_path / "here" / "job")
    state = (tmp_path / "here" / "job" / "qtool-run.json").read_bytes()
    assert again() == dict.fromkeys(STAGES, "kept")
    assert contents(tmp_path / "here" / "job") == before
    assert (tmp_path / "here" / "job" / "qtool-run.json").read_bytes() == state


def test_a_changed_recipe_redoes_what_depends_on_it(again: Callable[..., dict[str, str]]) -> None:
    kept = dict.fromkeys(("quantize", "eval", "convert to bfloat16"), "kept")
    changed = again(max_tokens=4, also="[bfloat16, modelslim]")
    assert changed == kept | {"convert to modelslim": "done", "generate": "done"}
    assert set(again(samples=3, also="[]").values()) == {"done"}


def test_a_flipped_bit_is_found_and_mended(
    again: Callable[..., dict[str, str]], finished: Path, tmp_path: Path
) -> None:
    for folder, stage in (("tiny-w8a8-static", "quantize"), ("tiny-w8a8-static-bfloat16", "convert to bfloat16")):
        file = tmp_path / "here" / "job" / folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-100] ^= 4
        status = file.stat()
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert again() == dict.fromkeys(STAGES, "kept") | {stage: "done"}
        assert file.read_bytes() == (finished / "job" / folder / "model.safetensors").read_bytes()


# ------------------------------------------------------------------ where the model comes from


@pytest.fixture
def repository(huggingface: Hub, tiny_llama: Path) -> Hub:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    huggingface.server.repos["org/tiny"] = Repo(files)
    return huggingface


def test_a_gguf_file(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "small.gguf")
    recipe = write_recipe(tmp_path, also="[]")
    recipe.write_text(
        re.sub(r"windows: \d+", "windows: 0", re.sub(r"prompts: .*\]", "prompts: []", recipe.read_text()))
    )
    done = run_qtool(*command(recipe, "small.gguf", "--json"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [stage["name"] for stage in summary["stages"]] == ["convert from GGUF", "quantize"]
    assert summary["work"] == str(tmp_path / "small-mine")
    assert (summary["eval"], summary["answers"]) == (None, None)
    name = "model.layers.0.self_attn.q_proj.weight"
    made = load_file(tmp_path / "small-mine" / "small" / "model.safetensors")[name]
    assert made.equal(load_file(tiny_llama / "model.safetensors")[name])


def test_a_gguf_file_named_like_its_repository(huggingface: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "small.gguf")
    huggingface.server.repos["org/small"] = Repo({"small.gguf": (tmp_path / "small.gguf").read_bytes()})
    recipe = write_recipe(tmp_path, model=ON_A_HUB.replace("tiny", "small"), also="[]")
    recipe.write_text(
        re.sub(r"windows: \d+", "windows: 0", re.sub(r"prompts: .*\]", "prompts: []", recipe.read_text()))
    )
    for status in ("done", "kept"):
        done = huggingface.run(*command(recipe, "--work", "job", "--json"), cwd=tmp_path, env=huggingface.env)
        assert done.code == 0, done.stderr
        assert {stage["status"] for stage in json.loads(done.stdout)["stages"]} == {status}
    assert {"small", "small-safetensors"} < {path.name for path in (tmp_path / "job").iterdir()}


def test_a_model_that_is_quantized_already(finished: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, also="[modelslim]")
    model = finished / "job" / "tiny-w8a8-static"
    done = run_qtool(*command(recipe, model, "--work", "job", "--json"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [stage["name"] for stage in summary["stages"]] == ["convert to modelslim", "generate"]
    assert summary["checkpoints"].keys() == {"compressed-tensors", "modelslim"}
    assert "is compressed-tensors already" in done.stderr


def test_a_damaged_download_is_mended(repository: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=ON_A_HUB, also="[]")
    recipe.write_text(recipe.read_text().replace("windows: 2", "windows: 0").replace("[I am, Today is]", "[]"))
    arguments = [*command(recipe, "--work", "job", "--json")]
    first = repository.run(*arguments, cwd=tmp_path, env=repository.env)
    assert first.code == 0, first.stderr
    file = tmp_path / "job" / "tiny" / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    second = repository.run(*arguments, cwd=tmp_path, env=repository.env)
    assert second.code == 0, second.stderr
    assert {stage["name"]: stage["status"] for stage in json.loads(second.stdout)["stages"]} == {
        "download": "done",
        "quantize": "kept",
    }
    assert file.read_bytes() == good
    # all is there: the hub isn't asked any more
    repository.server.repos.clear()
    third = repository.run(*arguments, cwd=tmp_path, env=repository.env)
    assert third.code == 0, third.stderr


# ------------------------------------------------------------------ killed


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same(
    repository: Hub, finished: Path, qtool_environment: dict[str, str], tmp_path: Path, moments: random.Random
) -> None:
    """The same as the undisturbed run made of the same model, beside the download itself and where it came from."""
    recipe = write_recipe(tmp_path, model=ON_A_HUB)
    environment = {**qtool_environment, **repository.env}
    arguments = command(recipe, "--work", "job")
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "qtool", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            process.communicate(timeout=moments.uniform(0.5, 10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    done = repository.run(*arguments, cwd=tmp_path, env=repository.env)
    assert done.code == 0, done.stderr
    assert not list((tmp_path / "job").glob(".*"))
    ours, theirs = contents(tmp_path / "job"), contents(finished / "job")
    assert {name for name in ours if not name.startswith("tiny/")} == theirs.keys()
    for name, data in theirs.items():
        if not name.endswith(("qtool.json", "eval.json")):
            assert ours[name] == data, name
    ours_eval, theirs_eval = (
        json.loads((folder / "eval.json").read_text()) for folder in (tmp_path / "job", finished / "job")
    )
    for key in ("base_perplexity", "quantized_perplexity", "kl_divergence", "top1_agreement", "text"):
        assert ours_eval[key] == theirs_eval[key], key


@pytest.mark.parametrize(("change", "goes_on"), [({"max_tokens": 4}, True), ({"samples": 3}, False)])
def test_killed_while_it_quantizes_and_changed(
    tiny_llama: Path,
    qtool_environment: dict[str, str],
    launcher: Launcher,
    run_qtool: Callable[..., Any],
    tmp_path: Path,
    change: dict[str, Any],
    goes_on: bool,
) -> None:
    """What was finished is used where the change lets it; where it doesn't, it is no obstacle."""
    arguments = command(write_recipe(tmp_path, also="[]"), tiny_llama, "--work", "job")
    process = launcher.start(arguments, cwd=tmp_path, env=qtool_environment, stderr=subprocess.DEVNULL)
    output = tmp_path / "job" / f"{tiny_llama.name}-w8a8-static"
    left = handle = None
    while left is None and process.poll() is None:
        for folder in output.parent.glob(f".{output.name}.partial-*"):
            with contextlib.suppress(FileNotFoundError):
                found = journal.read(folder)
                left = folder.stat().st_ino if found and found[1] else None
                handle = os.open(folder, os.O_RDONLY) if left else None  # else another folder may get its number
    process.kill()
    process.wait()
    assert left is not None
    assert handle is not None
    assert not output.exists(), "it was too quick"
    done = run_qtool(*command(write_recipe(tmp_path, also="[]", **change), tiny_llama, "--work", "job"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (output.stat().st_ino == left) is goes_on
    os.close(handle)
    assert not list(output.parent.glob(".*"))


# ------------------------------------------------------------------ wrong usage


def test_bad_input(finished: Path, tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    broken = tmp_path / "broken.yaml"
    broken.write_text(recipe.read_text() + "evall: {}\n")
    doubled = tmp_path / "doubled.yaml"
    doubled.write_text(recipe.read_text().replace("[golden-stick, bfloat16]", "[compressed-tensors]"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for arguments, message in (
        (("nonesuch", tiny_llama), "no recipe is named"),
        ((broken, tiny_llama), "did you mean 'eval'"),
        ((doubled, tiny_llama), "each format once, and not compressed-tensors"),
        ((recipe,), "this recipe names no model"),
        ((recipe, tmp_path / "nowhere"), "no such file or folder"),
        ((recipe, tmp_path / "full", "--work", tmp_path / "job"), "no config.json"),
        ((recipe, tiny_llama, "--work", tmp_path / "full"), "is not empty and not the folder of a job"),
        ((recipe, tiny_llama, "--work", tiny_llama / "job"), "lies in the model's folder"),
    ):
        done = run_qtool(*command(*arguments), cwd=tmp_path)
        assert (done.code, done.stdout) == (2, ""), arguments
        assert message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 3
    assert not (tiny_llama / "job").exists()


def test_a_further_format_that_can_not_be_right_is_refused_first(
    run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """Dynamic layers of a Llama are nothing that vLLM-MindSpore reads: said before anything is quantized."""
    recipe = write_recipe(tmp_path, also="[golden-stick]")
    recipe.write_text(recipe.read_text().replace("default_scheme: w8a8-static", "default_scheme: w8a8-dynamic"))
    done = run_qtool("run", recipe, tiny_llama, "--work", tmp_path / "job")
    assert (done.code, done.stdout) == (2, "")
    assert "export.also: golden-stick" in done.stderr
    assert [path.name for path in (tmp_path / "job").iterdir() if path.is_dir()] == []
