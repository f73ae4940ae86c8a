"""Files that belong with a model's weights: tokenizer, templates, license, readme."""

from __future__ import annotations

import re
from pathlib import Path

from qtool.checkpoint.formats import DESCRIPTION_FILES
from qtool.checkpoint.reader import LOCK, REPORT, Checkpoint

_NAMES = re.compile(
    r".+\.(json|txt|jinja|model|tiktoken|md|spm|vocab|bpe)"
    r"|(LICEN[CS]E|NOTICE|COPYING|README|USE_POLICY|USAGE_POLICY)([._-].*)?",
    re.IGNORECASE,
)
_OWN = {"config.json", REPORT, LOCK} | DESCRIPTION_FILES


def companions(checkpoint: Checkpoint, *, code: bool = False) -> list[Path]:
    """Such files, relative to the checkpoint's folder.

    Left out: weights, indexes, what a format or qtool wrote, pickles, links that leave the model's own storage,
    and Python code unless `code`.
    """
    folder = checkpoint.path
    found = [*folder.iterdir()]
    templates = folder / "additional_chat_templates"
    if templates.is_dir() and not templates.is_symlink():
        found += templates.iterdir()
    return sorted(
        file.relative_to(folder)
        for file in found
        if file.is_file()
        and file.name not in _OWN
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and (_NAMES.fullmatch(file.name) or (code and file.suffix == ".py"))
        and _is_own(folder.resolve(), file)
    )


def _is_own(folder: Path, file: Path) -> bool:
    """False for a link out of the folder; the blobs of a Hugging Face cache belong to its snapshots."""
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    return any(file.resolve().is_relative_to(home) for home in homes)
