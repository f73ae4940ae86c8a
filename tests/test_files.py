"""Files written whole or not at all, and paths that can't be looked at."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qtool import files
from qtool.errors import InputError, QtoolError

ROOT = Path(__file__).parent.parent


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "ä\n")
    files.write_bytes(tmp_path / "bytes", b"\0\1")
    files.write_json(tmp_path / "json", {"é": [1, "\ud800"]})
    files.write_json(tmp_path / "json", {"é": [1]}, indent=1)
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa4\n"
    assert (tmp_path / "bytes").read_bytes() == b"\0\1"
    assert (tmp_path / "json").read_text() == '{\n "é": [\n  1\n ]\n}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "json", "text"]


def test_json_takes_any_text() -> None:
    assert json.loads(files.encode_json({"a": "\ud800é"})) == {"a": "\ud800é"}
    assert files.encode_json("é") == '"é"\n'.encode()


def test_permissions_stay(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("old")
    secret.chmod(0o600)
    files.write_text(secret, "new")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "fresh", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640


def test_a_draft_of_a_killed_writer_is_used_again(tmp_path: Path) -> None:
    files.draft(tmp_path / "file").write_text("much longer than what comes")
    files.write_text(tmp_path / "file", "short")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "short")]


def test_a_link_where_the_draft_belongs_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    files.draft(tmp_path / "file").symlink_to(tmp_path / "precious")
    with pytest.raises(QtoolError, match="can't be written"):
        files.write_text(tmp_path / "file", "x")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Under a limit for files, in a process of its own."""
    code = """
import resource, signal, sys
from pathlib import Path
from qtool import files
from qtool.errors import QtoolError
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    files.write_bytes(Path(sys.argv[1]), b"x" * 1000, hint=sys.argv[2] if sys.argv[2:] else None)
except QtoolError as error:
    print(error, error.hint, sep="|")
"""
    file = tmp_path / "file"
    file.write_text("old")
    command = [sys.executable, "-c", code, str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output(command, env=env, text=True)
    what = f"{file}: no space left: 1,000 bytes could not be written, the size limit for files (ulimit -f) is reached"
    assert said == f"{what}|Free some space or choose another --output.\n"
    assert subprocess.check_output([*command, "Do this."], env=env, text=True) == f"{what}|Do this.\n"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="can't be written: No such file or directory") as caught:
        files.write_text(tmp_path / "none/file", "x")
    assert caught.value.where == str(tmp_path / "none/file")


def write_often(file: Path, letter: str) -> None:
    for length in range(1, 60):
        files.write_text(file, f"{length}:" + letter * length)


def test_writers_at_once_take_turns(tmp_path: Path) -> None:
    """Whoever reads at any moment finds what one of them wrote, whole."""
    file = tmp_path / "file"
    files.write_text(file, "1:x")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(file, letter)) for letter in "abc"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        length, _, text = file.read_text().partition(":")
        assert len(text) == int(length)
        assert len(set(text)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_space(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert abs(files.free_space(tmp_path / "not/there/yet") - free) < 10**9
    with pytest.raises(QtoolError, match=r"needs 1,000,000,000,000,000,000 bytes, [\d,]+ are free"):
        files.check_free_space(tmp_path / "new", 10**18)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/full").write_bytes(b"x" * 100_000)
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(10**8)
    assert 100_000 <= files.used_space(tmp_path) < 200_000


def test_looking_at_paths(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("none")
    found = {
        name: (files.exists(path), files.is_file(path), files.is_dir(path))
        for name in (".", "file", "pipe", "link", "dangling", "none", "file/below", "none/below")
        if (path := tmp_path / name)
    }
    assert found == {
        ".": (True, False, True),
        "file": (True, True, False),
        "pipe": (True, False, False),
        "link": (True, True, False),
        "dangling": (False, False, False),
        "none": (False, False, False),
        "file/below": (False, False, False),
        "none/below": (False, False, False),
    }


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
    ):
        for look in (files.exists, files.is_file, files.is_dir):
            with pytest.raises(InputError, match=why) as caught:
                look(path)
            assert caught.value.where is not None


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    """Root may enter any, so a process of another user looks."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    code = """
import os, sys
from pathlib import Path
from qtool import files
from qtool.errors import InputError
if os.geteuid() == 0:
    os.setuid(65534)
try:
    files.is_file(Path(sys.argv[1]) / "config.json")
except InputError as error:
    print(error.what)
"""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp") and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output([sys.executable, "-c", code, str(locked)], env=env, text=True)
    assert said == "can't be accessed: Permission denied\n"


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "link").symlink_to(".")
    assert files.real(tmp_path / "a").parent == files.real(tmp_path / "link")
    # Path.resolve raises RuntimeError there, so it is for our own files, and for checkpoints that have been opened.
    found = []
    for file in (ROOT / "qtool").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if (
                ".resolve()" in line
                and "Path(__file__).resolve()" not in line
                and "checkpoint.path.resolve()" not in line
            ):
                found.append(f"{file}: {line}")
    assert found == []


def test_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.expand("~/model") == tmp_path / "model"
    assert files.expand(Path("a/~")) == Path("a/~")
    with pytest.raises(InputError, match="home") as caught:
        files.expand("~no-such-user-here/model")
    assert caught.value.where == "~no-such-user-here/model"


def test_a_file_that_is_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files.check_new_file(tmp_path / "new", "--output", overwrite=False)
    files.check_new_file(tmp_path / "file", "--output", overwrite=True)
    for path, overwrite, what in (
        (tmp_path / "file", False, "exists already"),
        (tmp_path, True, "is a folder"),
        (tmp_path / "none/file", True, "no such folder"),
        (tmp_path / "file/below", True, "no such folder"),
        (tmp_path / ("x" * 253), False, "File name too long"),  # the file would do, what grows beside it would not
    ):
        with pytest.raises(InputError, match=what):
            files.check_new_file(path, "--output", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
