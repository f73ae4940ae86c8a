"""A quantized model against its original: who runs it, and what is told about both besides the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from qtool import runtimes
from qtool.calibration.sources import absolute
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.evaluation.job import ComparisonJob, EvaluationText, Vllm
from qtool.files import expand
from qtool.runtimes.settings import dtype


class Pair(NamedTuple):
    """A model and its quantized version."""

    base: Checkpoint
    quantized: Checkpoint


def opened(base: str | Path, quantized: str | Path) -> Pair:
    """Both, by absolute paths: what is wrong shows before torch is imported. Raises InputError."""
    return Pair(*(Checkpoint.open(expand(folder).absolute()) for folder in (base, quantized)))


def comparison(
    pair: Pair, text: EvaluationText, runtime: Literal["qtool", "vllm"], *, trust_remote_code: bool
) -> ComparisonJob:
    """The job that compares them.

    Args:
        text: a file's path may be relative, or begin with ~.
        runtime: who runs the quantized model.

    Raises:
        InputError: no vLLM here, or none that can.
    """
    return ComparisonJob(
        base=pair.base.path,
        quantized=pair.quantized.path,
        text=replace(text, data=absolute(text.data)),
        vllm=vllm_for(pair.quantized) if runtime == "vllm" else None,
        trust_remote_code=trust_remote_code,
    )


def vllm_for(checkpoint: Checkpoint) -> Vllm:
    """vLLM on this machine, as it runs this checkpoint. Raises InputError where only a plugin of vLLM's can."""
    format = formats.of(checkpoint).name
    chosen = runtimes.choose("vllm", format)
    if chosen.name != "vllm":
        raise InputError(
            f"vLLM reads {format} checkpoints through {chosen.name} only, whose logits it can't have",
            where="--runtime",
            hint="leave out --runtime: qtool computes what that runtime does with the same integers",
        )
    chosen = runtimes.adapted(chosen, checkpoint)
    engine = chosen.engine | {"dtype": dtype(checkpoint, runtimes.kind_of(chosen.name))}
    return Vllm(chosen.python, engine, {**chosen.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
