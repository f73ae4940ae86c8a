"""Whether vLLM on a CPU reads what qtool made of tiny models, and generates with it.

python -m tests.zoo.in_vllm [--only REGEX]

One process imports vLLM, and forks for each type: about 5 s each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.zoo import table

# The most used types that its CPU build has, of text, and of pictures and text (these are asked about text).
_TEXT = """
llama qwen2 qwen3 mistral ministral3 gemma gemma2 gemma3_text gemma4_text phi phi3 olmo olmo2 olmo3 granite glm glm4
starcoder2 gpt_neox gpt2 opt bloom falcon gptj stablelm cohere cohere2 exaone4 smollm3 seed_oss ernie4_5
hunyuan_v1_dense nemotron apertus mixtral qwen2_moe qwen3_moe olmoe granitemoe glm4_moe deepseek_v2 deepseek_v3
ernie4_5_moe gpt_oss minimax_m2 qwen3_next qwen3_5_text qwen3_5_moe_text lfm2 nemotron_h falcon_h1 granitemoehybrid
jamba mamba2
"""
_PICTURES = """
qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe gemma3 llama4 mistral3 internvl llava llava_next
llava_onevision paligemma idefics3 smolvlm aria cohere2_vision glm4v glm4v_moe lfm2_vl
"""
TYPES = {"text": _TEXT.split(), "image": _PICTURES.split()}
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


def _sections(*sizes: int) -> dict[str, Any]:
    """Of rotary positions in time, height and width, half a head in all."""
    return {"rope_parameters": {"mrope_section": [*sizes]}}


_DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 64}
_CONV = {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 192}
# What vLLM reads of config.json, and published ones have; and sizes that its kernels for CPUs take.
_MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "granitemoehybrid": {"mamba_d_head": 32},
    "lfm2": _CONV,
    "minimax_m2": {"head_dim": 32, "rotary_dim": 16, "scoring_func": "sigmoid"},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},  # Nano 2: no experts
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA),
    **{name: {"text_config": {**_DELTA, **_sections(2, 1, 1)}} for name in ("qwen3_5", "qwen3_5_moe")},
    **{name: {"text_config": _sections(4, 6, 6)} for name in ("qwen2_vl", "qwen2_5_vl")},
    "glm4v": {"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5}}},
    "qwen3_vl": {"text_config": _sections(6, 5, 5)},
    "qwen3_vl_moe": {"text_config": {**_sections(6, 5, 5), "norm_topk_prob": True}},
    "llama4": {"text_config": {"attention_chunk_size": 128}},
    "glm4v_moe": {"text_config": {**_sections(2, 2, 4), "use_qk_norm": False}},
    "lfm2_vl": {"text_config": _CONV},
}


def outcomes(only: re.Pattern[str], limit: float) -> Iterator[tuple[str, str]]:
    """(type, "N int8 tensors, generates" or what went wrong)."""
    _import()
    from tests.zoo.keeper import in_fork

    for kind, types in TYPES.items():
        for model_type in types:
            if only.search(f"{kind}:{model_type}"):
                content = in_fork(partial(_work, kind, model_type), limit)
                yield f"{kind}:{model_type}", "took too long or died" if not content else content.decode()


def _import() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from tests import loaded_vllm
    from tests.zoo import keeper

    loaded_vllm.load()
    keeper.import_all()
    from qtool.runtimes import kernels

    kernels.register()


def _work(kind: str, model_type: str, folder: Path) -> bytes:
    import torch
    from vllm import LLM, SamplingParams

    from tests.zoo import judge, models

    reasons = _noted()
    try:
        source = models.make(kind, model_type, folder / "float", _WIDER, _MORE.get(model_type))
        model = judge.load(kind, source)
        judge.quantize(source, folder / "int8", models.text(model, 8, 48, seed=1))
        ids = models.text(model, 2, 16, seed=2).tolist()
        del model
        _know(folder / "int8")
        llm: Any = LLM(
            str(folder / "int8"),
            limit_mm_per_prompt={} if kind == "text" else {"image": 0, "video": 0},
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
        if "No Int8 MoE backend" in str(error):
            return f"no int8 experts for CPUs: {reasons[-1]} (oracle/int8.py)".encode()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({Path(place.filename).name}:{place.lineno})"
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}".encode()


def _noted() -> list[str]:
    """Why vLLM's int8 experts for CPUs with AMX refuse a model, from now on."""
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    reasons, own = [], CPUExpertsInt8.is_supported_config

    def noting(*args: Any) -> tuple[bool, str | None]:
        supported, reason = own(*args)
        reasons.append(re.sub(r"(?<=method )\d+", lambda found: RoutingMethodType(int(found[0])).name, str(reason)))
        return supported, reason

    CPUExpertsInt8.is_supported_config = staticmethod(noting)
    return reasons


def _know(folder: Path) -> None:
    """Import the model's class here: vLLM would start an interpreter to look at it."""
    from vllm import ModelRegistry

    for architecture in json.loads((folder / "config.json").read_text())["architectures"]:
        if known := ModelRegistry.models.get(architecture):
            ModelRegistry.register_model(architecture, known.load_model_cls())


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
