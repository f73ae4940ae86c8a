"""Whether a model is meant to be talked with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

_FILES = ("chat_template.jinja", "chat_template.json")


def has_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint comes with a chat template, in any of the places where transformers 5 looks for one."""
    if any(file in checkpoint.files for file in _FILES):
        return True
    return "tokenizer_config.json" in checkpoint.files and bool(
        checkpoint.json("tokenizer_config.json").get("chat_template")
    )
