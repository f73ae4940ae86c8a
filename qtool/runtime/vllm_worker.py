"""vLLM, driven through its engine rather than its `LLM` class: less to import, and answers come as they finish.

On a CPU the engine runs in this very process; the cold start is nearly all imports, so everything
that would start further interpreters is avoided.
"""

from __future__ import annotations

import gc
import importlib
import os
from typing import Any

from qtool.errors import QtoolError
from qtool.runtime import mindspore
from qtool.runtime.common import Meter, Work, prepare
from qtool.workers import Report, hide_media_packages

BLOCK = 128  # tokens in a block of vLLM's CPU cache
MOST_CACHE_BYTES = 4 << 30


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Generate as `qtool.runtime.generate` says; returns the runtime's name and the seconds each stage took."""
    hide_media_packages()
    if job["runtime"] != "vllm-mindspore":
        return _generate(job, report)
    try:
        importlib.import_module("vllm_mindspore")  # it patches vLLM, when imported before it
        return _generate(job, report)
    except QtoolError:
        raise
    except Exception as error:
        if (known := mindspore.explain(error)) is not None:
            raise known from error
        raise


def _generate(job: dict[str, Any], report: Report) -> dict[str, Any]:
    meter = Meter(report, 0)
    report.progress("start vLLM", 0, 0)
    gc.disable()  # the imports make millions of objects that stay
    from vllm import EngineArgs, LLMEngine, ModelRegistry, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    meter.lap("import")
    work = prepare(job, report)
    meter.lap("tokenize")
    if in_process := os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        _know_the_model(ModelRegistry, work.config)
    gc.freeze()
    gc.enable()
    report.progress("load the model", 0, 0)
    engine = LLMEngine.from_engine_args(EngineArgs(**_arguments(job, work, in_process)))
    meter.lap("load")
    meter.total = sum(work.budgets)
    for index, ids in enumerate(work.prompts):
        parameters = SamplingParams(
            max_tokens=work.budgets[index],
            temperature=job["temperature"],
            top_p=job["top_p"],
            seed=job["seed"] + index,
            stop_token_ids=work.stop,
            ignore_eos=True,  # the stop ids say it all
            detokenize=False,
            logprobs=2 if job["gaps"] else None,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(index), {"prompt_token_ids": ids}, parameters)
    _drain(engine, work, job, meter)
    return {"runtime": job["runtime"], "seconds": meter.seconds}


def _drain(engine: Any, work: Work, job: dict[str, Any], meter: Meter) -> None:
    tokens: list[list[int]] = [[] for _ in work.prompts]
    gaps: list[list[float]] = [[] for _ in work.prompts]
    while engine.has_unfinished_requests():
        for output in engine.step():
            index, piece = int(output.request_id), output.outputs[0]
            tokens[index] += piece.token_ids
            for logprobs in piece.logprobs or []:
                best, second, *_ = sorted((entry.logprob for entry in logprobs.values()), reverse=True)
                gaps[index].append(best - second)
            saved = work.budgets[index] - len(tokens[index]) if output.finished else 0
            meter.add(len(piece.token_ids), saved)
            if output.finished:
                meter.report.item(work.answer(job, index, tokens[index], gaps[index]))


def _arguments(job: dict[str, Any], work: Work, in_process: bool) -> dict[str, Any]:
    """What vLLM's EngineArgs get: this job's needs over the machine's settings."""
    lengths = [len(ids) + budget for ids, budget in zip(work.prompts, work.budgets, strict=True)]
    arguments: dict[str, Any] = {
        "model": job["model"],
        "dtype": work.dtype,
        "max_model_len": max(lengths),
        "seed": job["seed"],
        "trust_remote_code": job["trust_remote_code"],
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "generation_config": "vllm",
        **job["engine"],
    }
    if in_process:  # memory that is asked for is touched: ask for what these prompts can fill
        together = min(len(lengths), arguments["max_num_seqs"])
        tokens = sum(_blocks(length) for length in sorted(lengths)[-together:]) + BLOCK
        most = max(MOST_CACHE_BYTES // _bytes_per_token(work), _blocks(max(lengths)) + BLOCK)
        arguments["kv_cache_memory_bytes"] = min(tokens, most) * _bytes_per_token(work)
    return arguments


def _blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _bytes_per_token(work: Work) -> int:
    """Key and value of every layer; an upper bound where config.json leaves it open."""
    config = work.config.get("text_config") or work.config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return (
        2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
        * (4 if work.dtype == "float32" else 2)
    )  # fmt: skip


def _know_the_model(registry: Any, config: dict[str, Any]) -> None:
    """Import the model's class here, where it is needed anyway: vLLM would start an interpreter to look at it."""
    for architecture in config.get("architectures") or []:
        if known := registry.models.get(architecture):
            registry.register_model(architecture, known.load_model_cls())
