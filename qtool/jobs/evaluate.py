"""A quantized model against its original: who runs it, and what is told about both besides the figures."""

from __future__ import annotations

import filecmp
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
    """Both, by absolute paths: what is wrong shows before torch is imported.

    Raises:
        InputError: no checkpoint, or two whose comparison means nothing: they are the same, of different models, or
            the quantized one is the first.
    """
    pair = Pair(*(Checkpoint.open(expand(folder).absolute()) for folder in (base, quantized)))
    for checkpoint in pair:
        checkpoint.check_claims()
    _check_order(pair)
    _check_same_model(pair)
    _check_not_equal(pair)
    return pair


def _check_order(pair: Pair) -> None:
    first, second = (formats.of(checkpoint) for checkpoint in pair)
    if not first.is_float and second.is_float:
        raise InputError(
            "the original model comes first, but this is the quantized one",
            where=str(pair.base.path),
            hint=f"qtool eval {pair.quantized.path} {pair.base.path}",
        )


_SAME = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


def _check_same_model(pair: Pair) -> None:
    """By what both config.json files say; what they leave out, the comparison itself finds out."""
    one, other = (checkpoint.config.get("text_config") or checkpoint.config for checkpoint in pair)
    for key in _SAME:
        if key in one and key in other and one[key] != other[key]:
            raise InputError(
                f"these are different models: {key} is {one[key]} and {other[key]}",
                where=f"{pair.base.path} and {pair.quantized.path}",
                hint="give the model that the quantized one was made from",
            )


def _check_not_equal(pair: Pair) -> None:
    """The first byte that differs ends the search, so it takes long only where there is nothing to compare."""
    one, other = (
        {checkpoint.info(name).file.name: checkpoint.info(name).file for name in checkpoint.names}
        for checkpoint in pair
    )
    alike = one.keys() == other.keys() and pair.base.config == pair.quantized.config
    if alike and all(filecmp.cmp(one[name], other[name], shallow=False) for name in one):
        raise InputError(
            "this is the original model itself: all its weights are the same",
            where=str(pair.quantized.path),
            hint="give a quantized model second; qtool quantize makes one",
        )


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
