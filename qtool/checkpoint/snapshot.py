"""Folders in Hugging Face's cache: `models--ORG--NAME/snapshots/COMMIT` (huggingface_hub 1.x)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_PREFIX = "models--"


class Snapshot(NamedTuple):
    """A repository at a commit.

    Attributes:
        repo: ORG/NAME.
    """

    repo: str
    commit: str


def of(folder: Path) -> Snapshot | None:
    """The snapshot that a folder is; None for one that lies elsewhere."""
    path = folder.absolute()
    repository = path.parents[1].name if len(path.parts) > 2 else ""
    if path.parent.name != "snapshots" or not repository.startswith(_PREFIX):
        return None
    return Snapshot(repository.removeprefix(_PREFIX).replace("--", "/", 1), path.name)


def title(folder: Path) -> str:
    """What a model's folder is called: its name, or in Hugging Face's cache its repository's."""
    found = of(folder)
    return found.repo.rpartition("/")[2] if found else folder.absolute().name
