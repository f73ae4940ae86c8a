"""An output folder is complete or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.convert.atomic import check_output, output_folder
from qtool.errors import InputError, QtoolError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_only_when_complete(tmp_path: Path) -> None:
    output = tmp_path / "a" / "model"
    with output_folder(output, overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o600)
        assert folder.parent == output.parent
        assert not output.exists()
    assert names(output.parent) == ["model"]
    assert names(output) == ["config.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert (output / "config.json").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "config.json").write_text("old")

    def fail() -> None:
        with output_folder(output, overwrite=True) as folder:
            (folder / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["model"]
    assert (output / "config.json").read_text() == "old"


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    for name in ("config.json", "old.safetensors"):
        (output / name).write_text("old")
    with output_folder(output, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(output) == ["config.json"]


def test_what_is_refused(tmp_path: Path) -> None:
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "precious").touch()
    file.touch()
    link.symlink_to(full)
    (tmp_path / "empty").mkdir()
    for overwrite in (False, True):
        for path in (full, file, link, file / "below"):
            with pytest.raises(InputError):
                check_output(path, overwrite=overwrite)
    check_output(tmp_path / "empty", overwrite=False)
    check_output(tmp_path / "new" / "deeper", overwrite=False)


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".model.partial-{dead.pid}", f".model.partial-{os.getppid()}", f".other.partial-{dead.pid}"):
        (tmp_path / name).mkdir()
    with output_folder(tmp_path / "model", overwrite=False):
        pass
    assert names(tmp_path) == sorted([f".model.partial-{os.getppid()}", f".other.partial-{dead.pid}", "model"])


def test_a_parent_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(QtoolError), output_folder(tmp_path / ("x" * 300) / "model", overwrite=False):
        pass
