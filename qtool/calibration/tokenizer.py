"""A checkpoint's tokenizer: what calibrates, evaluates and generates must all read the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtool.checkpoint.companions import is_companion
from qtool.errors import ForeignError, InputError, foreign

_MOST_BYTES = 200_000_000  # of a file; the largest vocabularies take 40 MB


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint folder, as transformers loads it.

    Raises:
        InputError: it is missing, damaged, empty or too large, or Python code that is not trusted.
    """
    from transformers import AutoTokenizer

    _check_sizes(folder)
    where = str(folder)
    hint = "Copy tokenizer.json and tokenizer_config.json from the original model into this folder."
    try:
        with foreign("no usable tokenizer", where=where, hint=hint):
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=True)
            words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    except ForeignError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        what = "the tokenizer needs Python code that comes with the model"
        raise InputError(what, where=where, hint="If you trust its author, add --trust-remote-code.") from error
    if not words:  # transformers makes one of tokenizer_config.json alone
        raise InputError("no usable tokenizer: its vocabulary is empty", where=where, hint=hint)
    return tokenizer


def _check_sizes(folder: Path) -> None:
    """Libraries read these files whole, however large they are."""
    for file in sorted(folder.iterdir()):
        if is_companion(file.name) and file.is_file() and file.stat().st_size > _MOST_BYTES:
            raise InputError(f"has {file.stat().st_size:,} bytes, too many for a tokenizer's file", where=str(file))
