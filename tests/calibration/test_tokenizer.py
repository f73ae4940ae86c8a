"""Damaged and empty tokenizers, through transformers itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qtool.calibration.tokenizer import load_tokenizer
from qtool.errors import ForeignError, InputError


@pytest.mark.parametrize(
    "change", [{"model": {"type": "WordPiece"}}, {"model": 7}, {"added_tokens": [{"id": -1}]}, {"version": None}]
)
def test_whatever_the_library_raises_is_bad_input(tmp_path: Path, tiny_tokenizer: Any, change: dict[str, Any]) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ForeignError, match="no usable tokenizer: ") as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert caught.value.where == str(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    """What transformers makes of a folder whose tokenizer.json is missing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="vocabulary is empty"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "added_tokens.json", "additional_chat_templates/x.jinja"):
        content = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        (tmp_path / name).write_bytes(content)
        os.truncate(tmp_path / name, 2 << 30)  # a hole
        with pytest.raises(InputError, match="too many for a tokenizer's file") as raised:
            load_tokenizer(tmp_path, trust_remote_code=False)
        assert raised.value.where == str(tmp_path / name)
        (tmp_path / name).unlink()
        if content != b"{}":
            (tmp_path / name).write_bytes(content)


def test_ids_that_no_vocabulary_has(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The library would make a list of all up to there."""
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    value = json.loads(file.read_text())
    value["model"]["vocab"][list(value["model"]["vocab"])[-1]] = 10**9
    file.write_text(json.dumps(value))
    with pytest.raises(InputError, match="token id 1000000000"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_settings_that_are_looked_at_late(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(ForeignError, match="no usable tokenizer"):
        load_tokenizer(tmp_path, trust_remote_code=False)
