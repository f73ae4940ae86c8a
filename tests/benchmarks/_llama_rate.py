# mypy: disable-error-code="import-not-found"
"""Tokens per second of a GGUF file. Runs in llama.cpp's environment: knows nothing of qtool.

usage: _llama_rate.py FILE.gguf JOBS.json THREADS

A job is {"prompts": token ids of each, "tokens": to write after each}; all its prompts are answered at once. Prints a
JSON list of rates, counted from the loaded model's first prompt to its last token, after a warm-up.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CONTEXT = 256  # of each prompt and its answer


def server(file: str, slots: int, threads: int) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_parallel, parameters.n_ctx = slots, slots * _CONTEXT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.warmup, parameters.verbosity = False, 0
    return xllamacpp.Server(parameters)


def answer(running: Any, prompt: list[int], tokens: int) -> None:
    pieces: list[dict[str, Any]] = []
    request = {"prompt": prompt, "stream": True, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True}
    refused = running.handle_completions(request | {"cache_prompt": False}, lambda piece: pieces.append(piece or {}))
    for each in (refused, *pieces):
        if isinstance(each, dict) and "error" in each:
            sys.exit(str(each)[:500])


def rate(file: str, job: dict[str, Any], threads: int) -> float:
    prompts, tokens = job["prompts"], job["tokens"]
    running = server(file, len(prompts), threads)
    answer(running, prompts[0][:8], 4)
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: answer(running, prompt, tokens), prompts))
    return float(len(prompts) * tokens / (time.perf_counter() - begin))


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps([rate(sys.argv[1], job, int(sys.argv[3])) for job in jobs]))
