"""`qtool upload` through both hubs' real clients, against hubs on loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub.fixtures import TOKEN, Hub, model_files, wanted
from tests.hub.loopback import FOREVER, Fault

REPORT = {
    "qtool": "0.1.0",
    "source": "base",
    "origin": {"hub": "huggingface", "repo": "org/base", "commit": "c0ffee" + "0" * 34},
    "format": "compressed-tensors",
    "scheme": "w8a8",
    "recipe": {"name": "llama3"},
    "calibration": {"source": "a|b.txt", "samples": 32, "seq_len": 512},
    "mean_relative_error": 0.000239,
}
README = "---\nlicense: llama3\nlanguage:\n- en\nevil: yes\n---\n# The original\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `qtool quantize` leaves it, and things that must stay here."""
    folder = tmp_path / "model-w8a8"
    for path, data in wanted(model_files(elements=1000)).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "README.md").write_text(README)
    (folder / "qtool.json").write_text(json.dumps(REPORT))
    (folder / "qtool.lock.json").write_text("{}")
    (folder / ".env").write_text("SECRET=1")
    return folder


def send(hub: Hub, *args: str | Path, **env: str) -> Any:
    return hub.run("upload", *args, "--to", hub.name, env={**hub.env, "HF_HUB_DISABLE_XET": "1", **env})


def expected(folder: Path) -> dict[str, bytes]:
    skipped = {"README.md", "qtool.lock.json", ".env"}
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if path not in skipped}


def test_a_folder_becomes_a_repository_with_a_card(hub: Hub, folder: Path) -> None:
    done = send(hub, folder, "org/new", "--private", **hub.token)
    assert done.code == 0, done.stderr
    models = "/models" if hub.name == "modelers" else ""
    assert done.stdout == f"{hub.server.url}{models}/org/new\n"
    assert hub.server.repos["org/new"].private
    there = dict(hub.server.repos["org/new"].files)
    there.pop(".gitattributes", None)
    card = there.pop("README.md").decode()
    assert there == expected(folder)
    assert card.strip() in done.stderr  # it was shown
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "llama3",
        "language": ["en"],
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["qtool", "compressed-tensors"],
    }
    for words in ("org/base at `c0ffee000000`", "32 x 512 tokens of a\\|b.txt", "2.39e-04", "recipe `llama3`"):
        assert words in card
    assert (folder / "README.md").read_text() == README
    assert not [headers for _, path, headers in hub.server.behind.requests if TOKEN in str(headers)]  # type: ignore[attr-defined]


def test_an_interrupted_upload_continues(hub: Hub, folder: Path) -> None:
    hub.server.faults["put"] = [Fault("status", status=200, times=0), Fault("status", status=418, times=FOREVER)]
    first = send(hub, folder, "org/new", **hub.token)
    assert (first.code, first.stdout) == (1, ""), first.stderr
    hub.server.faults.clear()
    done = send(hub, folder, "org/new", "--json", **hub.token)
    assert done.code == 0, done.stderr
    there = hub.server.repos["org/new"].files
    assert expected(folder).items() <= there.items()
    stored = len([1 for method, _, _ in hub.server.behind.requests if method == "PUT"])  # type: ignore[attr-defined]
    again = send(hub, folder, "org/new", "--json", **hub.token)
    assert json.loads(again.stdout)["sent"] == []
    assert len([1 for method, _, _ in hub.server.behind.requests if method == "PUT"]) == stored  # type: ignore[attr-defined]
    (folder / "config.json").write_text('{"model_type": "llama", "new": true}')
    changed = send(hub, folder, "org/new", "--json", **hub.token)
    assert json.loads(changed.stdout)["sent"] == ["config.json"]
    assert hub.server.repos["org/new"].files["config.json"] == (folder / "config.json").read_bytes()


def test_what_is_uploaded_can_be_downloaded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert send(hub, folder, "org/new", **hub.token).code == 0
    done = hub.download("org/new", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (tmp_path / "new" / "qtool.json").read_bytes() == (folder / "qtool.json").read_bytes()


def test_dry_run_sends_nothing(huggingface: Hub, folder: Path) -> None:
    done = send(huggingface, folder, "org/new", "--dry-run")
    assert done.code == 0
    assert done.stdout.split() == sorted([*expected(folder), "README.md"])
    assert "base_model: org/base" in done.stderr
    assert not huggingface.server.requests


def test_no_right_to_write(hub: Hub, folder: Path) -> None:
    for env in ({}, dict.fromkeys(hub.token, "wrong")):
        done = send(hub, folder, "org/new", **env)
        assert (done.code, done.stdout) == (2, ""), done.stderr
        assert "token" in done.stderr
    assert "org/new" not in hub.server.repos


def test_what_must_not_be_uploaded(run_qtool: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    done = run_qtool("upload", folder, "org/new")
    assert done.code == 2
    assert "leads out of the folder" in done.stderr
    (folder / "notes.txt").unlink()
    for make in (os.mkfifo, lambda file: file.symlink_to("nothing"), lambda file: file.symlink_to(file.name)):
        make(folder / "notes.txt")
        done = run_qtool("upload", folder, "org/new", "--dry-run")
        assert (done.code, "refused: a pipe, a device, or a link" in done.stderr) == (2, True), done.stderr
        (folder / "notes.txt").unlink()
    assert "not a repository's name" in run_qtool("upload", folder, "new").stderr
    assert "no config.json" in run_qtool("upload", tmp_path, "org/new").stderr


def test_a_folder_without_a_report_keeps_its_own_readme(huggingface: Hub, folder: Path) -> None:
    (folder / "qtool.json").unlink()
    done = send(huggingface, folder, "org/new", **huggingface.token)
    assert done.code == 0, done.stderr
    assert huggingface.server.repos["org/new"].files["README.md"].decode() == README


QUICK = ("--scheme", "w8a8-dynamic", "--samples", "2", "--seq-len", "16", "--engine", "native")


def push(hub: Hub, model: Path, folder: Path, *options: str, **env: str) -> Any:
    """`qtool quantize MODEL --push org/new` on this hub."""
    prefix = "modelers:" if hub.name == "modelers" else ""
    command = ("quantize", model, "-o", folder / "made", *QUICK, "--push", f"{prefix}org/new", *options)
    return hub.run(*command, env={**hub.env, "HF_HUB_DISABLE_XET": "1", **env}, cwd=folder)


def test_quantize_pushes_what_it_made(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    done = push(hub, tiny_llama, tmp_path, "--private", "--json", **hub.token)
    assert done.code == 0, done.stderr
    pushed = json.loads(done.stdout)["pushed"]
    there = dict(hub.server.repos["org/new"].files)
    there.pop(".gitattributes", None)
    assert hub.server.repos["org/new"].private
    assert {*pushed["sent"]} == {*there}
    assert there["model.safetensors"] == (tmp_path / "made" / "model.safetensors").read_bytes()
    assert b"# tiny-llama, 8-bit" in there["README.md"]


def test_quantize_asks_for_the_right_to_push_before_it_works(
    huggingface: Hub, tiny_llama: Path, tmp_path: Path
) -> None:
    huggingface.server.read_only.add("org/new")
    token = huggingface.token
    for options, env, code, message in (
        ((), {}, 2, "needs a token"),
        ((), token, 2, "may not"),
        (("--offline",), token, 2, "needs the network"),
        (("--push", "name"), token, 2, "is not a repository's name"),
        (("--push", "org/new@main"), token, 2, "is not a repository's name"),
        (("--calibration", "none.txt"), token, 2, "no such text file"),
    ):
        done = push(huggingface, tiny_llama, tmp_path, *options, **env)
        assert (done.code, done.stdout) == (code, ""), done.stderr
        assert message in done.stderr
        assert "2 layers" not in done.stderr  # nothing had begun
    assert not (tmp_path / "made").exists()
    done = huggingface.run("quantize", tiny_llama, "--private")
    assert (done.code, "goes with --push" in done.stderr) == (2, True)


def test_what_could_not_be_pushed_is_kept(huggingface: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    huggingface.server.faults["put"] = [Fault("status", status=418, times=FOREVER)]
    done = push(huggingface, tiny_llama, tmp_path, **huggingface.token)
    assert done.code == 1, done.stderr
    assert f"qtool upload {tmp_path / 'made'} org/new" in done.stderr
    assert (tmp_path / "made" / "config.json").exists()
