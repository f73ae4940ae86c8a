"""A checkpoint's tokenizer: what calibrates, evaluates and generates must all read the same one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qtool.checkpoint.companions import candidates, is_companion
from qtool.errors import ForeignError, InputError, foreign

_MOST_BYTES = 200_000_000  # of a file; the largest vocabularies take 40 MB

_MOST_ID = 10_000_000  # the largest vocabularies have a million
_LONG_NUMBER = re.compile(rb"\d{8}")


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint folder, as transformers loads it.

    Raises:
        InputError: it is missing, damaged, empty or too large, or Python code that is not trusted.
    """
    from transformers import AutoTokenizer

    _check_sizes(folder)
    _check_ids(folder)
    where = str(folder)
    hint = "Copy tokenizer.json and tokenizer_config.json from the original model into this folder."
    try:
        with foreign("no usable tokenizer", where=where, hint=hint):
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=True)
            tokenizer("")  # some settings are looked at only now
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
    for file in sorted(candidates(folder)):
        if is_companion(file.name) and file.is_file() and file.stat().st_size > _MOST_BYTES:
            raise InputError(f"has {file.stat().st_size:,} bytes, too many for a tokenizer's file", where=str(file))


def _check_ids(folder: Path) -> None:
    """tokenizers (0.23) lists all ids up to the largest: a thousand million took 4 GB."""
    for name in ("tokenizer.json", "vocab.json"):
        file = folder / name
        if not file.is_file() or not _LONG_NUMBER.search(data := file.read_bytes()):
            continue
        try:
            value = json.loads(data)
            vocabulary = value["model"]["vocab"] if name == "tokenizer.json" else value
            ids = [number for number in vocabulary.values() if isinstance(number, int)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # for the library to say
        if ids and max(ids) > _MOST_ID:
            raise InputError(f"has the token id {max(ids)}: no vocabulary is so large", where=str(file))
