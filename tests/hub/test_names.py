"""Names from a hub: whatever is let through stays below the folder, on every system's rules."""

from __future__ import annotations

import ntpath
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import InputError
from qtool.hub.listing import RemoteFile
from qtool.hub.names import MAX_FILES, check, name_problem

PIECES = [
    "..",
    ".",
    "",
    "/",
    "\\",
    "~",
    "C:",
    "a",
    "B",
    ".git",
    "nul",
    " ",
    "\u2215",
    "\u2024",
    "\uff0e",
    "x.json",
    "\0",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=40))
def test_what_is_let_through_stays_below_the_folder(name: str) -> None:
    if name_problem(name):
        return
    for paths, root in ((posixpath, "/models/m"), (ntpath, r"D:\models\m")):
        joined = paths.normpath(paths.join(root, name))
        assert joined.startswith(root + paths.sep)
        assert joined != root
    assert name.isprintable() or any(c.isspace() for c in name)


@pytest.mark.parametrize(
    "name",
    ["config.json", "a/b/c.json", "model-00001-of-00163.safetensors", ".gitattributes", "LICENSE", "模型/说明.txt",
     "a b.txt", "naïve.md", "console.json", "com10.txt", "..config", "...x", "a.b/c"],
)  # fmt: skip
def test_usual_names_are_fine(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["NUL", "nul.txt", "Con.json", "a/prn", "LPT9.x.y", "com¹", "CONIN$"])
def test_devices(name: str) -> None:
    assert "device" in str(name_problem(name))


def test_more_files_than_anybody_needs() -> None:
    files = [RemoteFile(f"f{i}", 1, "0" * 40) for i in range(MAX_FILES + 1)]
    with pytest.raises(InputError, match="100,001 files"):
        check(files, "org/m")
    check(files[:-1], "org/m")
