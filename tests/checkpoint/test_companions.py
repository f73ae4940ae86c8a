"""Which files go with a model's weights, and which stay behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from qtool.checkpoint import formats
from qtool.checkpoint.companions import companions
from qtool.checkpoint.reader import Checkpoint


def test_companions(make_folder: Callable[..., Path]) -> None:
    carried = ["LICENSE", "README.md", "merges.txt", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    other = [
        "modeling_x.py",
        "pytorch_model.bin",
        "training_args.pt",
        "x.pkl",
        ".hidden.json",
        "qtool.json",
        "qtool.lock.json",
        *formats.DESCRIPTION_FILES,
        "model.safetensors.index.json.bak",
    ]
    folder = make_folder({"model.safetensors": save({"a": torch.ones(2)})} | dict.fromkeys([*carried, *other], b"{}"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("")
    checkpoint = Checkpoint.open(folder)
    assert {str(file) for file in companions(checkpoint)} == {*carried, "additional_chat_templates/tools.jinja"}
    assert Path("modeling_x.py") in companions(checkpoint, code=True)
