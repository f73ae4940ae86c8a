"""What vLLM's EngineArgs get: a job's needs over the machine's settings, and the user's word over both."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint import config as claims
from qtool.errors import InputError
from qtool.runtimes.worker.front import Front

BLOCK = 128  # tokens in a block of vLLM's CPU cache
THREADS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
)


def check_settings(given: Mapping[str, Any], engine_args: type) -> None:
    """That vLLM knows each of these settings: fields of its EngineArgs, or (in capitals) its environment variables.

    Raises:
        InputError: it doesn't know one; with those of similar names.
    """
    import vllm.envs

    fields = {field.name: field.type for field in dataclasses.fields(engine_args)}
    for name in given:
        variable = name.isupper()
        known = [*vllm.envs.environment_variables, *THREADS] if variable else fields
        if name in known:
            if not variable:
                _check_type(name, given[name], fields[name])
            continue
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Similar: {', '.join(close)}." if close else "Its EngineArgs are named in vLLM's documentation."
        kind = "environment variable" if variable else "setting"
        raise InputError(f"vLLM has no {kind} {name!r}", where="--set", hint=hint)


def _check_type(name: str, value: Any, kind: Any) -> None:
    if isinstance(kind, str) or isinstance(value, dict):  # vLLM will look at it itself
        return
    import pydantic

    from qtool.recipe.words import worded

    try:
        pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.PydanticUserError:  # a type that pydantic knows nothing of
        return
    except pydantic.ValidationError as error:
        what = worded(error.errors(include_url=False)[0])
        raise InputError(f"{name}: {what}", where="--set") from None


@dataclass(frozen=True)
class Ahead:
    """The requests that are there before the model is loaded.

    Attributes:
        lengths: tokens of each, with its answer.
        complete: there will be no others.
    """

    lengths: list[int]
    complete: bool


def arguments(front: Front, ahead: Ahead, in_process: bool) -> dict[str, Any]:
    """EngineArgs by name. `in_process`: the engine runs in this very process."""
    job = front.job
    given: dict[str, Any] = {
        "model": job.model,
        "dtype": job.dtype,
        "seed": (job.sampling.get("seed") or 0) % (1 << 32),  # for numpy; requests have their own
        "trust_remote_code": job.trust_remote_code,
        "disable_log_stats": True,
        "generation_config": "vllm",
        "max_logprobs": -1,
        **job.engine,
    }
    given = {name: value for name, value in given.items() if value is not None}  # vLLM's own default
    if _worth_compiling(front, ahead) and "enforce_eager" not in job.arguments:
        given["enforce_eager"] = False
    fit = given.get("max_model_len") == -1
    if fit:
        del given["max_model_len"]
    if ahead.complete:
        given.setdefault("max_model_len", max(ahead.lengths))
    per_token = _bytes_per_token(front)
    if in_process and per_token is not None and "kv_cache_memory_bytes" in given:
        return given | _cache(front, ahead, given, per_token)
    return ({"max_model_len": -1} if fit else {}) | given


def _worth_compiling(front: Front, ahead: Ahead) -> bool:
    count = max(front.job.expected, len(ahead.lengths))
    tokens = count * front.job.sampling.get("max_tokens", front.context)
    return front.job.compile_from is not None and tokens >= front.job.compile_from


def _cache(front: Front, ahead: Ahead, given: Mapping[str, Any], per_token: int) -> dict[str, Any]:
    """Memory that is asked for is touched: ask for what these prompts can fill. `per_token`: bytes in the cache."""
    most = given["kv_cache_memory_bytes"]
    longest = given.get("max_model_len", min(front.context, max(most // per_token - BLOCK, BLOCK)))
    together = given.get("max_num_seqs", len(ahead.lengths) or 1)
    if ahead.complete:
        tokens = sum(_blocks(length) for length in sorted(ahead.lengths)[-together:])
    else:
        tokens = together * _blocks(max(ahead.lengths, default=longest))
    tokens = max(min(tokens, most // per_token), _blocks(longest)) + BLOCK
    wanted = most if "kv_cache_memory_bytes" in front.job.arguments else tokens * per_token
    return {"max_model_len": longest, "kv_cache_memory_bytes": wanted}


def _blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _bytes_per_token(front: Front) -> int | None:
    """Key and value of every layer; an upper bound where config.json leaves it open. None for a model without heads."""
    kept = claims.kept_per_token(front.config)
    return None if kept is None else kept * (4 if front.job.dtype == "float32" else 2)
