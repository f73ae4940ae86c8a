"""Files that belong with a model's weights: tokenizer, templates, license, readme."""

from __future__ import annotations

import re
from pathlib import Path

from qtool.checkpoint.formats import DESCRIPTION_FILES
from qtool.checkpoint.reader import LOCK, REPORT, Checkpoint
from qtool.errors import InputError
from qtool.files import real

_NAMES = re.compile(
    r".+\.(json|txt|jinja|model(\.v\d+)?|tiktoken|md|spm|vocab|bpe|codes|tokenizer)"
    r"|(LICEN[CS]E|NOTICE|COPYING|README|USE_POLICY|USAGE_POLICY)([._-].*)?",
    re.IGNORECASE,
)
_OWN = {"config.json", REPORT, LOCK} | DESCRIPTION_FILES


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs with weights."""
    return _NAMES.fullmatch(name) is not None


def companions(checkpoint: Checkpoint, *, code: bool = False) -> list[Path]:
    """Such files, relative to the checkpoint's folder.

    Left out: weights, indexes, what a format or qtool wrote, pickles, and Python code unless `code`.

    Raises:
        InputError: one is a link out of the model's own storage. It would be used, and yet must not be copied: a
            stranger's folder could so take any of the user's files along.
    """
    folder = checkpoint.path
    files = sorted(
        file
        for file in candidates(folder)
        if file.is_file()
        and file.name not in _OWN
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and (is_companion(file.name) or (code and file.suffix == ".py"))
    )
    for file in files:
        if not _is_own(real(folder), file):
            hint = "If the file belongs to the model, replace the link with a copy of the file."
            raise InputError(f"this link leads out of the model's folder, to {real(file)}", where=str(file), hint=hint)
    return [file.relative_to(folder) for file in files]


def candidates(folder: Path) -> list[Path]:
    """What may be one: all in the folder, and in that of further chat templates, which transformers reads too."""
    templates = folder / "additional_chat_templates"
    return [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]


def _is_own(folder: Path, file: Path) -> bool:
    """False for a link out of the folder, but to the blobs of a Hugging Face cache.

    They belong to its snapshots, and huggingface_hub's local_dir used to link large files there.
    """
    target = real(file)
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return cached or any(target.is_relative_to(home) for home in homes)
