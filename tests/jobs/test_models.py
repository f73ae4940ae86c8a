"""A model by any name: where it is found, and what is fetched, from a hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qtool
from qtool.errors import InputError
from qtool.jobs import models
from qtool.jobs.download import Place
from tests.cli.test_convert import write_gguf
from tests.hub.fixtures import Hub
from tests.hub.loopback import Fault, Repo

REPO = "org/tiny"
QUICK = ("--scheme", "w8a8-dynamic", "--samples", "2", "--seq-len", "16", "--engine", "native")


@pytest.fixture
def hub_with_model(huggingface: Hub, tiny_llama: Path) -> Hub:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    huggingface.server.repos[REPO] = Repo(files)
    return huggingface


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name", Place("org/name", "auto", None)),
        ("org/name@v1.0", Place("org/name", "auto", "v1.0")),
        ("modelers:Org/Na.me-1", Place("Org/Na.me-1", "modelers", None)),
        ("hf:org/name@refs/pr/1", Place("org/name", "huggingface", "refs/pr/1")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("org/name.gguf", None),
        ("~/name", None),
    ],
)
def test_what_a_name_means(text: str, place: Place | None) -> None:
    assert models.parse(text) == place


def test_a_hub_that_is_none() -> None:
    with pytest.raises(InputError, match="no hub is called modelscope"):
        models.parse("modelscope:org/name")


def test_a_name_is_fetched_once_and_checked(hub_with_model: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    """The cache is of this test's own; the output lies in the current folder and knows where the model is from."""
    env = {**hub_with_model.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    here = tmp_path / "here"
    here.mkdir()
    done = hub_with_model.run("quantize", REPO, *QUICK, cwd=here, env=env)
    assert (done.code, done.stdout) == (0, f"{here / 'tiny-w8a8-dynamic'}\n"), done.stderr
    report = json.loads((here / "tiny-w8a8-dynamic" / "qtool.json").read_text())
    assert report["origin"]["repo"] == REPO
    fetched = len(hub_with_model.server.sent("/"))
    assert fetched
    env["HF_HUB_OFFLINE"] = "1"
    done = hub_with_model.run("inspect", REPO, "--json", cwd=here, env=env)
    assert done.code == 0, done.stderr
    assert Path(json.loads(done.stdout)["path"]).is_relative_to(tmp_path / "cache")
    assert len(hub_with_model.server.sent("/")) == fetched


def test_bytes_that_are_not_the_hubs_are_refused(hub_with_model: Hub, tmp_path: Path) -> None:
    hub_with_model.server.faults[f"{REPO}/model.safetensors"] = [Fault("wrong", at=1000, times=5)]
    env = {**hub_with_model.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = hub_with_model.run("inspect", REPO, cwd=tmp_path, env=env)
    assert done.code == 1
    assert "the hash differs" in done.stderr
    assert not list((tmp_path / "cache").rglob("config.json")) or all(
        any(part.endswith(".partial") for part in path.parts) for path in (tmp_path / "cache").rglob("config.json")
    )


def test_a_download_in_the_current_folder_is_taken(hub_with_model: Hub, tmp_path: Path) -> None:
    assert hub_with_model.download(REPO, cwd=tmp_path).code == 0
    done = hub_with_model.run("inspect", REPO, "--json", "--offline", cwd=tmp_path, env=hub_with_model.env)
    assert json.loads(done.stdout)["path"] == str(tmp_path / "tiny"), done.stderr


@pytest.fixture
def hf_cache(tiny_llama: Path, tmp_path: Path) -> Path:
    """Hugging Face's cache with org/tiny in it, as huggingface_hub lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hf" / "models--org--tiny"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_llama.iterdir())):
        (folder / "blobs" / f"blob{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return tmp_path / "hf"


def test_hugging_faces_cache_is_taken(run_qtool: Callable[..., Any], hf_cache: Path, tmp_path: Path) -> None:
    env = {"HF_HUB_CACHE": str(hf_cache)}
    for name in (REPO, f"hf:{REPO}@main", f"{REPO}@0123456789abcdef0123456789abcdef01234567"):
        done = run_qtool("inspect", name, "--json", env=env, cwd=tmp_path)
        assert Path(json.loads(done.stdout)["path"]).is_relative_to(hf_cache), done.stderr
    done = run_qtool("quantize", REPO, *QUICK, env=env, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'tiny-w8a8-dynamic'}\n", done.stderr
    made = tmp_path / "tiny-w8a8-dynamic"
    assert not any(path.is_symlink() for path in made.iterdir())
    origin = json.loads((made / "qtool.json").read_text())["origin"]
    assert origin == {"hub": "huggingface", "repo": REPO, "commit": "0123456789abcdef0123456789abcdef01234567"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qtool.quantize(REPO, scheme="w1a1"), "no scheme 'w1a1'"),
        (lambda: qtool.evaluate(REPO, REPO), "this is the original model itself"),
        (lambda: qtool.evaluate(REPO, [f"hf:{REPO}"]), "this is the original model itself"),
        (lambda: qtool.generate(REPO, ["I am"], temperature=-1), "temperature"),
        (lambda: qtool.convert(REPO, "modelslim"), "not quantized"),
        (lambda: qtool.inspect(Path(REPO)), "no such folder"),
    ],
    ids=("quantize", "evaluate", "evaluate-several", "generate", "convert", "path"),
)
def test_functions_take_names_too(
    monkeypatch: pytest.MonkeyPatch, hf_cache: Path, tmp_path: Path, call: Callable[[], Any], message: str
) -> None:
    """What is wrong besides shows that the model has been found; a Path is never a name."""
    monkeypatch.setenv("HF_HUB_CACHE", str(hf_cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert Path(qtool.inspect(REPO)["path"]).is_relative_to(hf_cache)
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_cache_that_lacks_a_file_is_not_taken(
    run_qtool: Callable[..., Any], hf_cache: Path, tmp_path: Path, missing: str
) -> None:
    for snapshot in (hf_cache / "models--org--tiny" / "snapshots").iterdir():
        for file in snapshot.iterdir():
            if file.name == missing or (missing.startswith("tokenizer") and file.name.startswith("tokenizer")):
                file.unlink()
    done = run_qtool("inspect", REPO, env={"HF_HUB_CACHE": str(hf_cache)}, cwd=tmp_path)
    assert done.code == 2
    assert "no model of this name is on this machine" in done.stderr
    assert "--offline" in done.stderr


def test_what_no_hub_has(hub_with_model: Hub, tmp_path: Path) -> None:
    env = {**hub_with_model.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = hub_with_model.run("quantize", "org/nothing", cwd=tmp_path, env=env)
    assert done.code == 2
    assert "no such folder; and as a name: no such repository on Hugging Face" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "MODEL"),
        ("generate", "MODEL", "-p", "I am"),
        ("serve", "MODEL"),
        ("eval", "MODEL", "elsewhere"),
        ("eval", "GOOD", "MODEL"),
        ("analyze", "MODEL"),
        ("tune", "MODEL", "--max-kl", "0.01"),
        ("convert", "MODEL", "--to", "golden-stick"),
        ("inspect", "MODEL"),
        ("run", "smollm2", "MODEL"),
        ("upload", "MODEL", "me/mine"),
    ],
    ids=lambda words: f"{words[0]}{words.index('MODEL')}",
)
def test_a_wrong_path_is_not_asked_for_on_a_hub(
    hub_with_model: Hub, tiny_llama: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Its first part is a folder here, as in `build/made`."""
    (tmp_path / "build").mkdir()
    places = {"MODEL": "build/made", "GOOD": str(tiny_llama)}
    done = hub_with_model.run(*(places.get(word, word) for word in command), cwd=tmp_path, env=hub_with_model.env)
    assert done.code == 2, done.stderr
    assert "error: no such folder" in done.stderr
    assert str(tmp_path / "build" / "made") in done.stderr
    assert not hub_with_model.server.requests


def test_a_name_that_is_also_a_folders(hub_with_model: Hub, tmp_path: Path) -> None:
    """Where a folder has the organisation's name, a prefix says that the hub is meant; what was fetched is found."""
    env = {**hub_with_model.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "org").mkdir()
    done = hub_with_model.run("inspect", REPO, cwd=tmp_path, env=env)
    assert done.code == 2
    assert f"hf:{REPO}" in done.stderr
    assert hub_with_model.run("inspect", f"hf:{REPO}", cwd=tmp_path, env=env).code == 0
    assert hub_with_model.run("inspect", REPO, cwd=tmp_path, env=env).code == 0


def test_a_hub_that_does_not_answer(hub_with_model: Hub, tmp_path: Path) -> None:
    hub_with_model.server.faults["org/nothing/api"] = [Fault("status", status=418, times=9)]
    env = {**hub_with_model.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = hub_with_model.run("inspect", "org/nothing", cwd=tmp_path, env=env)
    assert done.code == 1
    assert "there is no folder org/nothing here" in done.stderr
    assert "the server answers 418" in done.stderr
    done = hub_with_model.run("inspect", "hf:org/nothing", cwd=tmp_path, env=env)
    assert "no folder" not in done.stderr


def test_a_gguf_file_is_a_model(run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    write_gguf(tiny_llama, file)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_qtool("inspect", file, "--json", env=env, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "float"
    again = run_qtool("inspect", file, env=env, cwd=tmp_path)
    assert "is converted first" in done.stderr
    assert "is converted first" not in again.stderr
