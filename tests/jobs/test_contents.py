"""What counts as a model's content, and that any change of it shows."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from qtool.errors import InputError
from qtool.jobs import contents


def of(folder: Path) -> str:
    return contents.together(contents.of_model(folder, lambda *_: None))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


def test_every_file_by_its_sha256(model: Path) -> None:
    found = contents.of_model(model, lambda *_: None)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= found.keys()
    for path, sha256 in found.items():
        assert sha256 == hashlib.sha256((model / path).read_bytes()).hexdigest()


def test_progress_counts_every_byte(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = contents.of_model(model, lambda done, total: seen.append((done, total)))
    total = sum((model / path).stat().st_size for path in found)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_any_change_shows(model: Path, name: str) -> None:
    before = of(model)
    data = bytearray((model / name).read_bytes())
    data[-3] ^= 1 if name.endswith("safetensors") else 0
    (model / name).write_bytes(bytes(data) if name.endswith("safetensors") else data.replace(b"{", b"{ ", 1))
    assert of(model) != before


def test_what_is_no_part_of_the_model_does_not(model: Path) -> None:
    before = of(model)
    (model / "qtool.json").write_text(json.dumps({"seconds": 3}))
    (model / "optimizer.pt").write_bytes(b"left by training")
    (model / ".cache").mkdir()
    (model / ".cache" / "config.json").write_text("{}")
    assert of(model) == before


def test_no_model_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        of(tmp_path)


def test_keys_have_no_order() -> None:
    assert contents.digest({"a": 1, "b": [2]}) == contents.digest({"b": [2], "a": 1}) != contents.digest({"a": 1})
