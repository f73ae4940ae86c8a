"""What a runtime is told for one checkpoint: over how many cards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qtool import runtimes
from qtool.checkpoint.reader import Checkpoint
from qtool.environments import machine
from qtool.runtimes import launch


def with_cards(model: Path, folder: Path, cards: int, executor: str) -> Checkpoint:
    """A model whose recipe, as qtool.json keeps it, wants so many cards."""
    shutil.copytree(model, folder, symlinks=True)
    recipe = {"generate": {"tensor_parallel_size": cards, "distributed_executor": executor}}
    (folder / "qtool.json").write_text(json.dumps({"recipe": recipe}))
    return Checkpoint.open(folder)


def told(name: str, checkpoint: Checkpoint) -> dict[str, object]:
    return launch.adapted(runtimes.Launch(name, "python", {"x": 1}), checkpoint).engine


@pytest.mark.parametrize("name", ["vllm", "vllm-mindspore", "vllm-ascend"])
@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_cards_come_from_the_recipe(
    name: str, executor: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(16))))
    engine = told(name, with_cards(tiny_llama, tmp_path / "m", 16, executor))
    assert engine == {"x": 1, "tensor_parallel_size": 16, "distributed_executor_backend": executor}
    from dataclasses import fields

    from vllm import EngineArgs

    assert set(engine) - {"x"} <= {field.name for field in fields(EngineArgs)}


@pytest.mark.parametrize(("there", "taken"), [(1, None), (2, 2), (6, 4), (8, 8), (40, 16), (0, 16)])
def test_no_more_cards_than_there_are(
    there: int, taken: int | None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = with_cards(tiny_llama, tmp_path / "m", 16, "mp")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "has_cuda", lambda: True)
    monkeypatch.setattr(machine, "cuda", lambda: {"devices": there})
    assert told("vllm", checkpoint).get("tensor_parallel_size") == taken


def test_a_cpu_has_no_cards(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    checkpoint = with_cards(tiny_llama, tmp_path / "m", 16, "mp")
    assert told("vllm", checkpoint) == told("transformers", checkpoint) == {"x": 1}


def test_a_model_without_a_recipe(tiny_llama: Path) -> None:
    assert told("vllm-ascend", Checkpoint.open(tiny_llama)) == {"x": 1}


def test_a_downloaded_model_has_the_cards_of_the_recipe_that_fits_it(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "DeepSeek-R1-W8A8"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "golden-stick"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "deepseek_v3", "quantization_config": method})
    )
    engine = launch._cards(runtimes.Launch("vllm-mindspore", "python"), Checkpoint.open(folder))
    assert engine == {"tensor_parallel_size": 16, "distributed_executor_backend": "mp"}
