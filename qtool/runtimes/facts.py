"""The runtimes, and which of them reads what. A new runtime is one more file like vllm.py, and one more line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputError
from qtool.runtimes import llama_cpp, sglang, transformers, vllm, vllm_ascend, vllm_mindspore
from qtool.runtimes.description import Limitation, Quantized, Runtime
from qtool.scheme import Scheme

# Where several read a format, `auto` takes the first one that is installed.
RUNTIMES = (
    vllm.RUNTIME,
    transformers.RUNTIME,
    llama_cpp.RUNTIME,
    vllm_mindspore.RUNTIME,
    vllm_ascend.RUNTIME,
)

# Those that read a checkpoint as it is.
DIRECT = tuple(runtime for runtime in RUNTIMES if not runtime.by_conversion)
# With those that qtool doesn't start, and knows something of.
KNOWN = (*DIRECT, sglang.RUNTIME)

# Who reads a format, is not started by qtool, and was not looked into.
ELSEWHERE = {"modelslim": ("MindIE",)}

NAMES = ("auto", *(runtime.name for runtime in RUNTIMES))


def get(name: str) -> Runtime:
    """A runtime by its name. Raises InputError for an unknown one."""
    for runtime in RUNTIMES:
        if runtime.name == name:
            return runtime
    raise InputError(f"unknown runtime {name!r}", where="--runtime", hint=f"One of {', '.join(NAMES)}.")


def readers(format: str) -> tuple[Runtime, ...]:
    """Who reads this format (as `formats.of` names it), the one that `auto` prefers first."""
    named = tuple(runtime for runtime in DIRECT if runtime.reading(format) is not None)
    return named or tuple(runtime for runtime in DIRECT if runtime.others)


def read_by(format: str) -> str:
    """The same in words, with those that qtool doesn't start: "vllm-ascend and MindIE"."""
    titles = [*(runtime.title for runtime in readers(format)), *ELSEWHERE.get(format, ())]
    return " and ".join(filter(None, [", ".join(titles[:-1]), *titles[-1:]]))


def problems(
    format: str,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme | None],
    dtype: str | None = None,
    cache: str | None = None,
) -> list[Limitation]:
    """What the readers of a format don't read of a model; empty when all is well.

    What one of several readers can't load is no problem as long as another one can.

    Args:
        config: the model's config.json.
        schemes: every linear layer's scheme by its name without ".weight"; None where it stays float.
        dtype: safetensors code of the float tensors, such as BF16.
        cache: how keys and values are kept, by its name in `qtool.scheme.CACHES`; None for floats.
    """
    model = Quantized(config, schemes, dtype, cache)
    found = [runtime.limitations(format, model) for runtime in readers(format)]
    read = any(not any(limitation.refuses for limitation in limitations) for limitations in found)
    return [each for limitations in found for each in limitations if each.fatal or not (each.unread and read)]
