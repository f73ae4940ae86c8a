"""A checkpoint's tokenizer: what calibrates, evaluates and generates must all read the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtool.errors import ForeignError, InputError, foreign


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint folder, as transformers loads it.

    Raises:
        InputError: it is missing, damaged or empty, or Python code that is not trusted.
    """
    from transformers import AutoTokenizer

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
