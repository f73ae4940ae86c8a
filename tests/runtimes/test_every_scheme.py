"""Every scheme of compressed-tensors, with and without FP8 keys and values, in vLLM: loaded whole, and generating.

What vLLM's build for CPUs has no kernel for is loaded by its own code all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.environments import machine
from qtool.runtimes.kernels import int8
from tests.checkpoint.readings import READERS, run
from tests.engines.conftest import quantize
from tests.managed import REPOSITORY
from tests.runtimes.schemes_in_vllm import PROMPT, TOKENS

__all__ = ["quantize"]

pytestmark = pytest.mark.vllm

MIXTURE = [
    {"layers": "lm_head", "quantize": False},
    {"layers": r".*\.self_attn\..*", "scheme": "W8A8-dynamic"},
    {"layers": r".*\.down_proj", "scheme": "FP8-dynamic", "smoothing": "none"},
    {"layers": ".*", "scheme": "W4A16-g64"},
]
AVX512 = "avx512f" in machine.cpu_flags()
INT8 = "ExactInt8LinearKernel" if int8.needed() else "CPUInt8ScaledMMLinearKernel"
INT4 = "CPUWNA16LinearKernel" if AVX512 else "WeightOnlyLinearKernel"
# scheme -> the kernel that vLLM 0.32 takes for it on a CPU, with qtool's; None where there is none
KERNELS: dict[str, str | None] = {
    "w8a8": INT8,
    "w8a8-dynamic": INT8,
    "w8a8-asymmetric": INT8,
    "w8a16": "WeightOnlyLinearKernel",
    "w4a16-g64": INT4,
    "w4a16-channel": INT4,
    "w4a8-g64": INT4,
    "w4a8-channel": INT4,
    "fp8-dynamic": "ChannelWiseTorchFP8ScaledMMLinearKernel",
    "fp8-block": "CPUFp8BlockScaledMMKernel" if "amx_tile" in machine.cpu_flags() else None,
    "mixture": INT4,
}
CACHES = {"": None, "+fp8": "fp8"}


@pytest.fixture(scope="module")
def folders(make_model: Callable[..., Path], quantize: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """A checkpoint by its scheme's name, with "+fp8" where keys and values are."""
    from qtool.recipe.load import load

    sizes = {"intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
    model, base = make_model("llama", hidden_size=256, **sizes), tmp_path_factory.mktemp("schemes")
    found = {}
    for scheme in KERNELS:
        recipe = load("default").with_scheme(scheme) or load("default")
        schemes = recipe.model_dump(mode="json")["schemes"] | {"mixture": MIXTURE}
        for suffix, cache in CACHES.items():
            found[scheme + suffix] = base / (scheme + suffix)
            quantize(model, found[scheme + suffix], scheme=scheme, schemes=schemes, kv_cache=cache)
    return found


def test_every_tensor_finds_its_parameter(folders: dict[str, Path], tmp_path: Path) -> None:
    """By vLLM's own loading code; nothing is computed."""
    (reader,) = (each for each in READERS if each.runtime == "vllm")
    for line in run(reader, folders.values(), tmp_path / "work"):
        name = Path(line["model"]).name
        if name.startswith("fp8-block") and KERNELS["fp8-block"] is None:
            assert "AMX" in line["error"]  # it asks for a kernel before it loads
            continue
        assert (line.get("error"), line["untouched"], line["unread"]) == (None, [], []), line
        assert line["tensors"] > 20


def test_it_generates_or_has_no_kernel(folders: dict[str, Path]) -> None:
    """What it says is what transformers says of the same files, but for ties."""
    asked = [str(folder) for name, folder in folders.items() if not name.endswith("-channel+fp8")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtimes.schemes_in_vllm", *asked],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]
    assert [line["model"] for line in lines] == asked, done.stderr[-3000:]
    for line in lines:
        name = Path(line["model"]).name
        kernel, cache = KERNELS[name.removesuffix("+fp8")], "fp8" if name.endswith("+fp8") else "auto"
        if kernel is None:
            assert "kernel" in line["error"].lower(), line
            continue
        if cache == "fp8" and not AVX512:
            assert "AVX-512" in line["error"], line  # qtool keeps floats there: tests/engines/test_cache.py
            continue
        assert "error" not in line, line
        assert kernel in line["kernels"], line
        assert all(each.startswith(cache) for each in line["cache"]), line
        assert len(line["ids"]) == TOKENS
        assert sum(behind(Path(line["model"]), line["ids"])) / TOKENS < 0.3, line  # of chance tokens it would be 2 or 3


def behind(folder: Path, ids: list[int]) -> list[float]:
    """By how many standard deviations of the logits each token is less likely to transformers than its favourite."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    found: list[float] = ((logits.amax(-1) - chosen) / logits.std(-1)).tolist()
    return found
