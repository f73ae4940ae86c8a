"""A quantized model against its original: who runs it, and what is told about both besides the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool import runtimes
from qtool.checkpoint import formats
from qtool.errors import InputError
from qtool.evaluation.job import Vllm
from qtool.runtimes.settings import dtype

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint


def vllm_for(checkpoint: Checkpoint) -> Vllm:
    """vLLM on this machine, as it runs this checkpoint. Raises InputError where only a plugin of vLLM's can."""
    format = formats.of(checkpoint).name
    chosen = runtimes.choose("vllm", format)
    if chosen.name != "vllm":
        raise InputError(
            f"vLLM reads {format} checkpoints through {chosen.name} only, whose logits it can't have",
            where="--runtime",
            hint="leave it out: qtool computes what that runtime does with the same integers",
        )
    chosen = runtimes.adapted(chosen, checkpoint)
    engine = chosen.engine | {"dtype": dtype(checkpoint, runtimes.kind_of(chosen.name))}
    return Vllm(chosen.python, engine, {**chosen.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
