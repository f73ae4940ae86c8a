"""What a job will need, said beforehand; and a limit that is kept to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.engines import plan
from qtool.engines.job import CalibrationText
from qtool.engines.native.estimate import ResourceEstimate
from qtool.engines.native.estimate import estimate as estimated
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.recipe.load import load

SIZE = (32, 128)  # samples, tokens


@pytest.fixture
def estimate(tiny_llama: Path) -> Callable[[int | None], ResourceEstimate]:
    checkpoint = Checkpoint.open(tiny_llama)
    stream = DecoderStream(checkpoint, dtype=torch.bfloat16)
    planned = plan.make(checkpoint, load("default"), "w8a8", "compressed-tensors", stream.linears())
    return lambda limit: estimated(
        stream, planned.policies, CalibrationText("builtin", *SIZE), exact=False, limit=limit
    )


def test_a_limit_makes_batches_smaller(estimate: Callable[[int | None], ResourceEstimate]) -> None:
    free = estimate(None)
    limited = estimate(free.memory_bytes - 1)
    assert limited.batch_tokens < free.batch_tokens
    assert limited.memory_bytes < free.memory_bytes
    assert estimate(free.memory_bytes) == free


def test_a_limit_below_one_sample_is_refused(estimate: Callable[[int | None], ResourceEstimate]) -> None:
    least = estimate(None)
    while least.batch_tokens > SIZE[1]:
        least = estimate(least.memory_bytes - 1)
    with pytest.raises(InputError, match="are allowed") as error:
        estimate(least.memory_bytes - 1)
    assert error.value.where == "--memory"


def test_the_command_line(tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path) -> None:
    size = ("--samples", str(SIZE[0]), "--seq-len", str(SIZE[1]))
    done = run_qtool("quantize", tiny_llama, "-o", tmp_path / "out", "--memory", "100MB", *size)
    assert done.code == 2
    assert "0.10 GB are allowed" in done.stderr
    assert not list(tmp_path.iterdir())
    plan = json.loads(run_qtool("quantize", tiny_llama, *size, "--dry-run", "--json").stdout)
    done = run_qtool("quantize", tiny_llama, "-o", tmp_path / "out", *size, "--json")
    assert done.code == 0, done.stderr
    peak = json.loads(done.stdout)["peak_memory_bytes"]
    assert peak < plan["estimated_peak_bytes"] < 3 * peak
    assert plan["scratch_bytes"] >= 2 * SIZE[0] * SIZE[1] * 64  # what enters a layer, in bfloat16
