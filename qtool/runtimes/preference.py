"""What `auto` takes for a job: on a CPU llama.cpp for one prompt, if it is installed; else what `launch` chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import workers
from qtool.environments import lookup
from qtool.errors import InputError, QtoolError
from qtool.files import write_text
from qtool.gguf.layers import Layers
from qtool.runtimes import launch, llama_cpp
from qtool.runtimes.launch import Launch

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

# New tokens per second of SmolLM2-135M in w8a8-dynamic on 2 cores of a Xeon with AMX, as docs/benchmarks.md has them:
# 1 prompt: llama.cpp 64, vLLM 41; 8 prompts: 190 and 280; 64 prompts: 191 and 1,100.
_FASTER_UP_TO = 1  # prompts
_ALONE = llama_cpp.RUNTIME.name


@dataclass(frozen=True)
class Prompting:
    """What of a job decides who does it.

    Attributes:
        prompts: how many there are; a conversation counts as one. None where nobody knows.
        sampling: what is asked for, by vLLM's names.
        arguments: what `--set` says.
        reasoning_parser: vLLM's name of what splits thinking from answers.
    """

    prompts: int | None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reasoning_parser: str | None = None

    @property
    def beyond(self) -> str | None:
        """What llama.cpp can't do of it, in words; None for nothing."""
        if self.arguments:
            return "--set"
        if self.reasoning_parser is not None:
            return f"reasoning parser {self.reasoning_parser}"
        assert llama_cpp.RUNTIME.sampling is not None
        return ", ".join(sorted(self.sampling.keys() - llama_cpp.RUNTIME.sampling)) or None


@dataclass(frozen=True)
class Preferred:
    """A runtime, and in one line why; None where there was nothing to choose."""

    launch: Launch
    why: str | None = None


def prefer(
    runtime: str, checkpoint: Checkpoint, job: Prompting, on_event: Callable[[workers.Event], None]
) -> Preferred:
    """Who does a job. Nothing is installed or downloaded for it; llama.cpp's file is made where it is missing.

    Args:
        runtime: a name, which settles it, or auto.
        on_event: hears of the progress of making the file.

    Raises:
        InputError: an unknown runtime, one that can't read the checkpoint, or one that isn't installed.
    """
    from qtool.checkpoint import formats

    format = formats.of(checkpoint).name
    if runtime != "auto" or launch.kind_of("vllm") != "cpu" or not _installed(_ALONE):
        return Preferred(launch.choose(runtime, format))
    if _installed("vllm"):
        against, why = _against(job), "at one prompt on a CPU it is faster than vLLM (--runtime vllm takes the other)"
    else:
        against, why = _impossible(job), "vLLM is not installed"
    if (against := against or _unfit(checkpoint) or _missing(checkpoint, on_event)) is None:
        return Preferred(launch.choose(_ALONE, format), f"llama.cpp answers: {why}")
    chosen = launch.choose(runtime, format)
    return Preferred(chosen, f"{chosen.runtime.title} answers: {against}")


def _installed(name: str) -> bool:
    return lookup.locate(name) is not None


def _against(job: Prompting) -> str | None:
    if (impossible := _impossible(job)) is not None:
        return impossible
    if job.prompts is None:
        return "there may be many prompts, and at those it is faster than llama.cpp"
    if job.prompts > _FASTER_UP_TO:
        return f"at {job.prompts} prompts it is faster than llama.cpp"
    return None


def _impossible(job: Prompting) -> str | None:
    return None if job.beyond is None else f"llama.cpp can't do {job.beyond}"


def _unfit(checkpoint: Checkpoint) -> str | None:
    """Why llama.cpp's file would not hold the numbers that the checkpoint has; None if it would."""
    from qtool.checkpoint.summary import kept_cache

    try:
        layers = Layers(checkpoint)
    except InputError as error:
        return f"llama.cpp's file can't be made: {error.what}"
    if (cache := kept_cache(checkpoint)) is not None:
        return f"llama.cpp doesn't keep keys and values as {cache}"
    for name in layers.names():
        if (scheme := layers.scheme(name)) is not None and layers.blocks(name) is None:
            return f"llama.cpp has no type for {scheme.label}"
    return None


def _missing(checkpoint: Checkpoint, on_event: Callable[[workers.Event], None]) -> str | None:
    """Make llama.cpp's file if there is none; why it can't be made, or None. A model it can't take is remembered."""
    file = llama_cpp.file_of(checkpoint)
    refused = file.with_name(f"refused by {llama_cpp.RUNTIME.version}.txt")
    if file.exists():
        return None
    if refused.exists():
        return refused.read_text(encoding="utf-8")
    job: dict[str, Any] = {"model": str(checkpoint.path.resolve()), "file": str(file)}
    try:
        workers.run("qtool.runtimes.worker.gguf_file", job, python=lookup.interpreter(_ALONE), on_event=on_event)
    except InputError as error:
        why = str(error.what)
        _remember(refused, why)
        return why
    except QtoolError as error:  # such as a full disk
        return str(error.what)
    return None


def _remember(file: Path, why: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, why)
