"""Repositories that mean harm, through both real clients: each is refused with its reason, and nothing gets outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.errors import InputError
from qtool.hub.storage import locked
from tests.hub.fixtures import Hub, contents, model_files
from tests.hub.loopback import FOREVER, Fault, Repo

Change = Callable[[Repo], object]
SHARD = "model-00001-of-00002.safetensors"


def add(*names: str) -> Change:
    return lambda repo: repo.files.update(dict.fromkeys(names, b"{}"))


def entry(**entry: object) -> Change:
    """One more entry in the listing."""
    return lambda repo: repo.extra.append({"type": "file", "oid": "0" * 40, "size": 2, **entry})


def listed(path: str, **change: object) -> Change:
    return lambda repo: repo.listed.update({path: change})


REFUSED: dict[str, tuple[Change, str]] = {
    "parent": (add("../evil.json"), "points outside the folder"),
    "parent within": (add("a/../../evil.json"), "points outside the folder"),
    "absolute": (entry(path="/tmp/evil.json"), "absolute"),
    "home": (entry(path="~/.ssh/authorized_keys"), "absolute"),
    "drive": (add("C:evil.json"), "absolute"),
    "backslash": (add("..\\evil.json"), "character \\"),
    "alternate stream": (add("config.json:evil.json"), "character :"),
    "current": (entry(path="./config.json"), "empty part"),
    "empty part": (entry(path="a//b.json"), "empty part"),
    "device": (add("aux.json"), "device"),
    "device in a folder": (add("deep/COM1/x.json"), "device"),
    "line end": (entry(path="a\nb.json"), "U+000A"),
    "null": (entry(path="a\0b.json"), "U+0000"),
    "escape sequence": (entry(path="\x1b[2Jb.json"), "U+001B"),
    "turned direction": (entry(path="model\u202egnp.json"), "U+202E"),
    "trailing dot": (add("config.json."), "ends with a dot"),
    "trailing blank": (entry(path="config.json "), "blank"),
    "git hook": (entry(path=".git/hooks/post-checkout"), ".git folder"),
    "case": (add("CONFIG.json"), "same name"),
    "case by Unicode": (add("con\ufb01g.json"), "same name"),
    "file as folder": (entry(path="config.json/x.json"), "is a file, so it can't be a folder"),
    "long part": (add("x" * 300 + ".json"), "longer than 255"),
    "long name": (entry(path="x/" * 600 + "y.json"), "longer than 1024"),
    "link": (entry(type="symlink", path="link.json"), "a link or a submodule"),
    "submodule": (entry(type="commit", path="sub"), "a link or a submodule"),
    "no hash": (listed("config.json", oid=""), "neither a file"),
    "strange hash": (listed("config.json", oid="../../x"), "no hash"),
    "negative size": (listed("config.json", size=-1), "its size is"),
    "size as text": (listed("config.json", size="many"), "its size is"),
    "impossible size": (listed(SHARD, size=1 << 60), "its size is"),
}


# the check is the same for both hubs; what differs is how their clients and listings put these things
ON_MODELERS_TOO = {
    "parent", "parent within", "absolute", "backslash", "empty part", "device", "line end", "turned direction",
    "git hook", "case", "link", "submodule", "strange hash", "negative size", "impossible size",
}  # fmt: skip


def everything(folder: Path) -> set[str]:
    return {os.path.relpath(path, folder) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("hub", "name"),
    [("huggingface", name) for name in REFUSED] + [("modelers", name) for name in REFUSED if name in ON_MODELERS_TOO],
    indirect=["hub"],
)
def test_what_a_hub_lists_is_refused_with_its_reason(hub: Hub, tmp_path: Path, name: str) -> None:
    change, reason = REFUSED[name]
    repo = Repo(model_files(elements=10))
    change(repo)
    hub.server.repos["org/model"] = repo
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    done = hub.download("org/model", cwd=work, HOME=str(tmp_path))
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "refused" in done.stderr
    assert reason in done.stderr
    assert done.stderr.isprintable() or done.stderr.replace("\n", "").isprintable()
    assert everything(tmp_path) <= {"a", "a/b"}
    assert not hub.server.sent("/resolve/") + hub.server.sent("/media/")


def test_what_is_excluded_may_be_as_it_likes(hub: Hub, tmp_path: Path) -> None:
    repo = Repo(model_files(elements=10))
    add("aux.json", "CONFIG.json")(repo)
    hub.server.repos["org/model"] = repo
    done = hub.download("org/model", "--exclude", "aux.json", "--exclude", "CONFIG*", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "aux.json" not in contents(tmp_path / "model")


def test_a_file_larger_than_announced_never_fills_the_disk(hub: Hub, tmp_path: Path) -> None:
    files = model_files(elements=10)
    files["tokenizer.json"] = b"[" * 3_000_000
    hub.server.repos["org/model"] = Repo(files, listed={"tokenizer.json": {"size": 1000}})
    done = hub.download("org/model", cwd=tmp_path)
    assert (done.code, done.stdout) == (1, ""), done.stderr
    assert not (tmp_path / "model").exists()
    assert max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1000


def test_pickles_are_taken_only_when_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.server.repos["org/model"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"cos\nsystem"})
    for args in ([], ["--include", "*"]):
        done = hub.download("org/model", *args, "--to", "m", cwd=tmp_path)
        assert (done.code == 0) == bool(args), done.stderr
        assert "pytorch_model.bin" not in everything(tmp_path / "m")
        assert args or "'pytorch_model.bin': it can be a pickle" in done.stderr
    done = hub.download("org/model", "--include", "*.bin", "--to", "asked", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert set(contents(tmp_path / "asked")) == {"pytorch_model.bin"}


def test_a_lock_that_the_hub_brings_is_not_ours(hub: Hub, tmp_path: Path) -> None:
    files = model_files(elements=10)
    files["qtool.lock.json"] = files["QTOOL.lock.json"] = b'{"forged": true}'
    hub.server.repos["org/model"] = Repo(files)
    done = hub.download("org/model", "--include", "*.json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert b"forged" not in (tmp_path / "model" / "qtool.lock.json").read_bytes()
    assert "QTOOL.lock.json" not in everything(tmp_path / "model")


@pytest.mark.parametrize("place", ["", "complete", "incomplete", "complete/additional", "complete/config.json"])
def test_a_link_planted_in_the_partial_folder(hub: Hub, tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    work = tmp_path / "work"
    link = work / ".model.partial" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "new.txt" if place.endswith(".json") else outside, target_is_directory=True)
    hub.server.repos["org/model"] = Repo(model_files(elements=10))
    done = hub.download("org/model", cwd=work)
    assert contents(outside) == {"precious": b"precious"}, done.stderr
    assert done.code == 2 or contents(work / "model"), done.stderr
    assert not any(path.is_symlink() for path in (work / "model").rglob("*"))


def test_a_partial_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".model.partial"
    folder.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)  # only root could make one for real
    with pytest.raises(InputError, match="belongs to another user"), locked(folder, lambda: None):
        pass


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("gzip", 1, "sends 'gzip', where the bytes themselves were asked for"),
        ("huge", 2, "an answer of more than 64 MB"),
    ],
)
def test_an_answer_without_bounds(hub: Hub, tmp_path: Path, kind: str, code: int, message: str) -> None:
    hub.server.repos["org/model"] = Repo(model_files(elements=10))
    hub.server.faults["org/model/api"] = [Fault(kind, times=FOREVER)]
    done = hub.download("org/model", cwd=tmp_path)
    assert (done.code, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert everything(tmp_path) == set()


def test_a_listing_without_end(huggingface: Hub, tmp_path: Path) -> None:
    huggingface.server.repos["org/model"] = Repo(model_files(elements=10))
    huggingface.server.endless = True
    done = huggingface.download("org/model", cwd=tmp_path)
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "its listing has more than" in done.stderr


@pytest.mark.parametrize("path", [None, 7, ["a"], {"a": 1}, True], ids=str)
@pytest.mark.parametrize("hub", ["huggingface"], indirect=True)
def test_a_name_that_is_no_text(hub: Hub, tmp_path: Path, path: object) -> None:
    repo = Repo(model_files(elements=10))
    entry(path=path)(repo)
    hub.server.repos["org/model"] = repo
    done = hub.download("org/model", cwd=tmp_path)
    assert (done.code in (1, 2), done.stdout) == (True, ""), done.stderr
    assert "its name is not text" in done.stderr or "can't be understood" in done.stderr
    assert "bug in qtool" not in done.stderr


def test_an_endless_wait_is_not_obeyed(hub: Hub, tmp_path: Path) -> None:
    hub.server.repos["org/model"] = Repo(model_files(elements=10))
    hub.server.faults["org/model/api"] = [Fault("status", status=429, retry_after="100000", times=FOREVER)]
    done = hub.download("org/model", cwd=tmp_path)
    assert done.code == 1
    assert "429" in done.stderr
