"""`qtool eval --runtime vllm` against log-probabilities that vLLM itself hands out, for its whole vocabulary."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processor import runtime_dtype

WINDOWS, LENGTH = 2, 40

pytestmark = pytest.mark.vllm

# A bare script: every token's log-probabilities over all 512 entries, in a file.
SCRIPT = """
import json, sys
for package in ("torchaudio", "torchcodec", "torchvision"):
    sys.modules[package] = None
model, ids, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
import torch
from vllm import LLM, SamplingParams

size = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 24}
llm = LLM(model, dtype=sys.argv[4], enforce_eager=True, max_logprobs=512, **size)
outputs = llm.generate([{"prompt_token_ids": row} for row in ids], SamplingParams(max_tokens=1, prompt_logprobs=512))
rows = [[[entry[i].logprob for i in range(512)] for entry in o.prompt_logprobs[1:]] for o in outputs]
torch.save(torch.tensor(rows), output)
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_qtool: Callable[..., Any]) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "model"
    done = run_qtool("quantize", tiny_llama, "--output", output, "--samples", "4", "--seq-len", "64")
    assert done.code == 0, done.stderr
    return output


def test_it_is_what_vllm_computes(
    tiny_llama: Path,
    quantized: Path,
    run_qtool: Callable[..., Any],
    qtool_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text(topics[sorted(topics)[-1]][:2000], encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(tiny_llama)(text.read_text(encoding="utf-8"))["input_ids"]
    ids = torch.tensor(tokens[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    own = {**qtool_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    arguments = [str(quantized), json.dumps(ids.tolist()), str(tmp_path / "logs.pt"), runtime_dtype()]
    script = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=own, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr[-2000:]
    q = torch.load(tmp_path / "logs.pt").double()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        p = model(ids).logits[:, :-1].double().log_softmax(-1)

    options = ("--text", text, "--windows", str(WINDOWS), "--length", str(LENGTH), "--json")
    done = run_qtool("eval", tiny_llama, quantized, *options, "--runtime", "vllm")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["runtime"] == {"name": "vllm", "dtype": runtime_dtype()}
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl > 1e-4
    assert found["kl_divergence"]["value"] == pytest.approx(kl, rel=1e-3)
    surprise = -q.gather(2, ids[:, 1:, None]).mean().item()
    assert found["quantized_perplexity"]["value"] == pytest.approx(math.exp(surprise), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["top1_agreement"]["value"] == pytest.approx(agreement, abs=1.01 / q[..., 0].numel())

    # what qtool computes layer by layer is the same but for bfloat16 and the kernels' rounding
    done = run_qtool("eval", tiny_llama, quantized, *options)
    streamed = json.loads(done.stdout)
    assert streamed["kl_divergence"]["value"] == pytest.approx(kl, rel=0.5)
    assert (
        json.loads((quantized / "qtool.json").read_text())["evaluation"]["kl_divergence"] == streamed["kl_divergence"]
    )


def test_what_vllm_reads_through_a_plugin_is_refused(
    tiny_llama: Path, run_qtool: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "model"
    small = ("--samples", "4", "--seq-len", "64")
    done = run_qtool("quantize", tiny_llama, "--output", output, "--format", "golden-stick", *small)
    assert done.code == 0, done.stderr
    done = run_qtool(
        "eval", tiny_llama, output, "--runtime", "vllm", env={"QTOOL_VLLM_MINDSPORE_PYTHON": sys.executable}
    )
    assert done.code == 2
    assert "--runtime" in done.stderr
    assert "vllm-mindspore" in done.stderr
