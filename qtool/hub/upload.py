"""What of a folder goes to a hub. Runs in the parent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.reader import LOCK, REPORT, Checkpoint
from qtool.checkpoint.summary import schemes
from qtool.errors import InputError
from qtool.files import read_json, real
from qtool.hub.card import card
from qtool.hub.names import name_problem, shown
from qtool.runtimes.table import as_it_is

README = "README.md"


@dataclass(frozen=True)
class Parcel:
    """What will be sent.

    Attributes:
        files: local files by path in the repository.
        card: the model card that goes as README.md, or None when the folder's own README does.
    """

    files: dict[str, Path]
    card: str | None

    @property
    def names(self) -> list[str]:
        """The paths in the repository of all that will be sent."""
        return sorted([*self.files, *([README] if self.card else [])])

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values()) + len((self.card or "").encode())


@dataclass(frozen=True)
class Given:
    """What the uploader knows of a model that qtool.json and README.md may not know.

    Attributes:
        base_model: the original's ORG/NAME.
        license: as hubs call it, such as apache-2.0.
    """

    base_model: str | None = None
    license: str | None = None


def pack(folder: Path, repo: str, given: Given) -> Parcel:
    """Look at a model folder: everything in it goes, except hidden files and the lock of a download.

    Raises:
        InputError: not a model folder, a link that leads out of it, or a name that no hub should get.
    """
    checkpoint = Checkpoint.open(folder)
    files = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_dir() or any(part.startswith(".") for part in path.parts) or path.as_posix() == LOCK:
            continue
        if not real(file).is_relative_to(real(folder)):
            hint = "Copy the file into the folder if it is to be uploaded."
            raise InputError("refused: a link that leads out of the folder", where=str(file), hint=hint)
        if not file.is_file():
            hint = "Remove it."
            raise InputError("refused: a pipe, a device, or a link that leads nowhere", where=str(file), hint=hint)
        if problem := name_problem(path.as_posix()):
            raise InputError(f"refused {shown(path)}: {problem}", where=str(folder), hint="Rename or remove it.")
        files[path.as_posix()] = file
    if REPORT not in files:
        return Parcel(files, None)
    readme = files.pop(README).read_text(encoding="utf-8", errors="replace") if README in files else ""
    found = filter(None, schemes(checkpoint).values())
    report = read_json(folder / REPORT)
    if given.base_model is not None:
        report |= {"origin": {"repo": given.base_model}}
    return Parcel(files, card(repo, report, readme, found, ways=as_it_is(checkpoint), license=given.license))
