"""The calibration text as token ids, made in a process that has transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.errors import InputError, in_one_line
from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Tokenize and cut a text.

    Job keys: model (a folder with a tokenizer), data, samples, seq_len, seed (as `qtool.calibration.text.load` takes
    them), trust_remote_code.

    Returns:
        ids ([samples][seq_len]), digest, source.

    Raises:
        InputError: no usable tokenizer, no such text, or too little of it.
    """
    hide_media_packages()
    from transformers import AutoTokenizer

    from qtool.calibration.text import load

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            job["model"], trust_remote_code=job["trust_remote_code"], local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(
            f"the tokenizer can't be loaded: {in_one_line(error)}",
            where=job["model"],
            hint="tokenizer.json and tokenizer_config.json must lie beside the weights",
        ) from error
    found = load(job["data"], tokenizer, samples=job["samples"], seq_len=job["seq_len"], seed=job["seed"])
    return {"ids": found.ids.tolist(), "digest": found.digest, "source": found.source}
