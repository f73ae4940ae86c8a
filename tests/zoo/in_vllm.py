"""Whether vLLM on a CPU reads what qtool made of tiny models, and generates with it.

python -m tests.zoo.in_vllm [--only REGEX]

One process imports vLLM, and forks for each type: about 5 s each.
"""

from __future__ import annotations

import argparse
import os
import re
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.zoo import table

# The most used types of text models that its CPU build could run.
TYPES = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "ministral3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi",
        "phi3",
    ),
    *(
        "olmo",
        "olmo2",
        "olmo3",
        "granite",
        "glm",
        "glm4",
        "starcoder2",
        "gpt_neox",
        "gpt2",
        "opt",
        "bloom",
        "falcon",
        "gptj",
    ),
    *("stablelm", "cohere", "cohere2", "exaone4", "smollm3", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "nemotron"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe"),
    *("gpt_oss", "minimax_m2", "granitemoe", "qwen3_next", "qwen3_5_text", "lfm2", "nemotron_h", "mamba2", "bamba"),
)
# vLLM's attention on CPUs wants heads of 32 channels or more.
_WIDER = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_head_dim": 32,
    "n_embd": 128,
    "ffn_hidden_size": 512,
    "moe_shared_expert_intermediate_size": 96,
}

_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 64}
# What vLLM reads of config.json, and published ones have; and sizes that its kernels for CPUs take.
_MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "lfm2": {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 192},
    "minimax_m2": {"head_dim": 32, "rotary_dim": 16, "scoring_func": "sigmoid"},
    "qwen3_next": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "bamba": {"mamba_d_head": 32},
}


def outcomes(only: re.Pattern[str], limit: float) -> Iterator[tuple[str, str]]:
    """(type, "N int8 tensors, generates" or what went wrong)."""
    _import()
    from tests.zoo.keeper import in_fork

    for model_type in TYPES:
        if only.search(model_type):
            content = in_fork(partial(_work, model_type), limit)
            yield model_type, "took too long or died" if not content else content.decode()


def _import() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from qtool.workers import hide_media_packages

    hide_media_packages()
    from tests.zoo import keeper

    keeper.import_all()
    import vllm  # noqa: F401

    from qtool.runtimes import int8_kernel

    int8_kernel.register()


def _work(model_type: str, folder: Path) -> bytes:
    import torch
    from vllm import LLM, SamplingParams

    from tests.zoo import judge, models

    try:
        source = models.make("text", model_type, folder / "float", _WIDER, _MORE.get(model_type))
        model = judge.load("text", source)
        judge.quantize(source, folder / "int8", models.text(model, 8, 48, seed=1))
        ids = models.text(model, 2, 16, seed=2).tolist()
        del model
        llm: Any = LLM(
            str(folder / "int8"),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=64,
            max_num_seqs=2,
        )
        (count,) = llm.apply_model(_int8)
        sampling = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)
        answers = llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
        made = [len(answer.outputs[0].token_ids) for answer in answers]
        torch.set_num_threads(1)
        return f"{count} int8 tensors, generates {made}".encode()
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({Path(place.filename).name}:{place.lineno})"
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}".encode()


def _int8(model: Any) -> int:
    import torch

    count = sum(parameter.dtype == torch.int8 for parameter in model.parameters())
    # A weight whose sizes are no multiples of 32 goes into oneDNN's own memory; its scale remains.
    own = (dict(module.named_parameters(recurse=False)) for module in model.modules())
    return count + sum("weight_scale" in parameters and "weight" not in parameters for parameters in own)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.in_vllm")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--docs", action="store_true", help="write the section of docs/models.md; everything must run")
    options = parser.parse_args()
    found = []
    for model_type, outcome in outcomes(re.compile(options.only), 180):
        print(model_type, outcome, flush=True)
        found.append((model_type, outcome))
    if options.docs:
        page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
        page.write_text(table.with_other_section(page.read_text(), table.in_vllm(found)))


if __name__ == "__main__":
    main()
