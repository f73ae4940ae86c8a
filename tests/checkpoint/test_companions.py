"""Which files go with a model's weights, and which stay behind."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from qtool.checkpoint import formats
from qtool.checkpoint.companions import companions
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError


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
    templates = folder / "templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("")
    (folder / "additional_chat_templates").symlink_to("templates")
    checkpoint = Checkpoint.open(folder)
    assert {str(file) for file in companions(checkpoint)} == {*carried, "additional_chat_templates/tools.jinja"}
    assert Path("modeling_x.py") in companions(checkpoint, code=True)


def tokenizer_files() -> Iterator[str]:
    """What the tokenizers of transformers read, by their own tables: VOCAB_FILES_NAMES and its like."""
    import transformers

    for source in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                values = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
                if any(str(key).endswith("_file") for key in keys):
                    yield from (value for value in values if isinstance(value, str))


def test_whatever_a_tokenizer_reads_goes_along(make_folder: Callable[..., Path]) -> None:
    names = {*tokenizer_files(), "tokenizer.model.v3", "tekken.json", "qwen.tiktoken", "chat_template.jinja"}
    assert {"vocab.txt", "merges.txt", "tokenizer.json", "spiece.model", "bpe.codes"} < names
    folder = make_folder({"model.safetensors": save({"a": torch.ones(2)})} | dict.fromkeys(names, b"{}"))
    assert {str(file) for file in companions(Checkpoint.open(folder))} == names


def test_templates_elsewhere_are_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder({"model.safetensors": save({"a": torch.ones(2)})})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tools.jinja").write_text("")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of the model's folder"):
        companions(Checkpoint.open(folder))
