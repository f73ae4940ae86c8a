"""The calibration text as token ids, made in a process that has transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from qtool.calibration.text import load
    from qtool.calibration.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    found = load(job["data"], tokenizer, samples=job["samples"], seq_len=job["seq_len"], seed=job["seed"])
    return {"ids": found.ids.tolist(), "digest": found.digest, "source": found.source}
