"""What vLLM's build for CPUs generates from checkpoints: python -m tests.runtimes.schemes_in_vllm FOLDER...

Prints a line of JSON for each: `ids`, 8 tokens after PROMPT, greedily; `kernels`, of its linears; `cache`, how it
keeps keys and values; or `error`, why it didn't start. vLLM is imported once; each folder has a fork of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPT = list(range(4, 20))
TOKENS = 8


def main(folders: list[str]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    from qtool.runtimes import kernels
    from tests import loaded_vllm
    from tests.zoo.keeper import in_fork

    loaded_vllm.load()
    kernels.register()
    for folder in folders:

        def work(_: Path, folder: str = folder) -> bytes:
            return json.dumps(_generate(folder)).encode()

        found = in_fork(work, 120)
        line = json.loads(found) if found else {"error": "took too long or died"}
        print(json.dumps({"model": folder, **line}), flush=True)


def _generate(folder: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    size = {"max_model_len": 64, "max_num_seqs": 1, "kv_cache_memory_bytes": 1 << 24}
    try:
        llm: Any = LLM(folder, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, **size)
        ((kernels, cache),) = llm.apply_model(_look)
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
        (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ids": list(answer.outputs[0].token_ids), "kernels": kernels, "cache": cache}


def _look(model: Any) -> tuple[list[str], list[str]]:
    from vllm.model_executor.layers.attention.attention import Attention

    kernels, caches = set(), set()
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        kernels |= {type(each).__name__ for each in vars(scheme or object).values() if "Kernel" in type(each).__name__}
        if isinstance(module, Attention):
            caches.add(module.kv_cache_dtype)
    return sorted(kernels), sorted(caches)


if __name__ == "__main__":
    main(sys.argv[1:])
