"""The model is opened once, and everything is read through the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.native import context, device
from tests import families
from tests.model.test_weights import Rotated, rotated_on_disk


def test_one_process_opens_the_model_once(
    tiny_tokenizer: Any, quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.make(tmp_path / "model", "qwen3_moe", tiny_tokenizer)
    opened, built = (mock.Mock(wraps=each) for each in (Checkpoint.open, AutoModelForCausalLM.from_config))
    monkeypatch.setattr(Checkpoint, "open", opened)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", built)
    quantize(model, tmp_path / "out")
    assert (opened.call_count, built.call_count) == (1, 1)


def test_a_change_of_the_whole_model_reaches_all_that_is_written(
    tiny_llama: Path, quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotating the residual stream of a model as it is read comes to the same as quantizing the rotated model."""
    monkeypatch.setattr(device, "compute_dtype", lambda _device, exact: torch.float32)
    quantize(rotated_on_disk(tiny_llama, tmp_path / "rotated"), tmp_path / "expected", scheme="w8a8")
    monkeypatch.setattr(
        context,
        "FloatReader",
        lambda checkpoint, device, **options: Rotated(FloatReader(checkpoint, device, **options)),
    )
    quantize(tiny_llama, tmp_path / "found", scheme="w8a8")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "found"))
    assert list(found) == list(expected)
    for name, tensor in found.items():
        if tensor.dtype == torch.int8 and tensor.ndim == 2:
            # Sums in another order: error compensation passes on what a number on the edge rounds to.
            assert float((tensor.int() - expected[name].int()).abs().float().mean()) < 0.1, name
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=1e-3)
