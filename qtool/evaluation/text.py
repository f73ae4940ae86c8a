"""The windows of text that models are evaluated on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qtool.calibration.sources import BUILTIN
from qtool.calibration.text import Calibration, held_out, load
from qtool.calibration.tokenizer import load_tokenizer
from qtool.checkpoint import config as claims
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.evaluation.job import EvaluationText

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


def windows_of(text: EvaluationText, checkpoint: Checkpoint, *, trust_remote_code: bool) -> Calibration:
    """The text in a checkpoint's tokens. Raises InputError when there is too little."""
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
    try:
        if text.data == BUILTIN:
            return held_out(tokenizer, samples=text.windows, seq_len=text.length)
        return load(text.data, tokenizer, samples=text.windows, seq_len=text.length, seed=0)
    except InputError as error:
        hint = error.hint and error.hint.replace("--samples", "--windows").replace("--seq-len", "--length")
        raise InputError(error.what, where=error.where, hint=hint) from None


def windows_of_all(
    text: EvaluationText, base: Checkpoint, others: Iterable[Checkpoint], *, trust_remote_code: bool
) -> Calibration:
    """The same for several checkpoints. Raises InputError when a tokenizer makes other tokens of it than the base's."""
    found = windows_of(text, base, trust_remote_code=trust_remote_code)
    for other in others:
        if all(_bytes(base.path / name) == _bytes(other.path / name) for name in _TOKENIZER_FILES):
            continue
        if windows_of(text, other, trust_remote_code=trust_remote_code).digest != found.digest:
            raise InputError(
                "the two models' tokenizers make different tokens of the text",
                where=f"{base.path} and {other.path}",
                hint="give the model that the quantized one was made from",
            )
    return found


def check_length(text: EvaluationText, checkpoint: Checkpoint) -> None:
    """Raises InputError for windows longer than the model's context."""
    context = claims.context(checkpoint.config)
    if isinstance(context, int) and text.length > context:
        raise InputError(
            f"windows of {text.length} tokens, but the model's context is {context}",
            where="--length",
            hint=f"use --length {context} or less",
        )


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
