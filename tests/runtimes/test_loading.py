"""What transformers as a runtime does with a checkpoint that doesn't fit its code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.errors import InputError
from qtool.runtimes.worker import transformers
from tests import families


class Warnings:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def warning(self, text: str) -> None:
        self.seen.append(text)


@pytest.fixture
def load(tiny_llama: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Load the tiny model with other tensors; gives the warnings."""

    def run(change: Callable[[dict[str, torch.Tensor]], Any]) -> list[str]:
        folder = tmp_path / "model"
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors = families.load(tiny_llama)
        change(tensors)
        families.save(tensors, folder)
        job: Any = SimpleNamespace(model=str(folder), dtype="float32", trust_remote_code=False)
        report: Any = Warnings()
        transformers._load(job, report)
        return list(report.seen)

    return run


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors: tensors.pop(NAME), f"lacks tensors .*{re.escape(NAME)}"),
        (lambda tensors: tensors.update({f"{NAME}_scale": torch.ones(3)}), f"doesn't read: {re.escape(NAME)}_scale"),
    ],
)
def test_what_would_be_random_or_half_read_is_refused(
    load: Callable[..., list[str]], change: Callable[[dict[str, torch.Tensor]], Any], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        load(change)


def test_a_further_layer_is_told(load: Callable[..., list[str]]) -> None:
    (warning,) = load(lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3, 3)}))
    assert "model.layers.7.mlp.up_proj.weight" in warning
