"""Quantized models against their original: who runs them, and what can't be compared."""

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


class Models(NamedTuple):
    """A model and its quantized versions."""

    base: Checkpoint
    quantized: tuple[Checkpoint, ...]


def opened(base: str | Path, *quantized: str | Path) -> Models:
    """All of them, by absolute paths: what is wrong shows before torch is imported.

    Raises:
        InputError: no checkpoint, or some whose comparison means nothing: two are the same, they are of different
            models, or a quantized one comes first.
    """
    first, *others = (Checkpoint.open(expand(folder).absolute()) for folder in (base, *quantized))
    for checkpoint in (first, *others):
        checkpoint.check_claims()
    for i, other in enumerate(others):
        _check_order(first, other)
        _check_same_model(first, other)
        if _are_equal(first, other):
            raise InputError(
                "this is the original model itself: all its weights are the same",
                where=str(other.path),
                hint="give a quantized model after the original; qtool quantize makes one",
            )
        if twin := next((earlier for earlier in others[:i] if _are_equal(earlier, other)), None):
            raise InputError("is the same model as another one", where=f"{other.path} and {twin.path}")
    return Models(first, tuple(others))


def _check_order(base: Checkpoint, quantized: Checkpoint) -> None:
    if not formats.of(base).is_float and formats.of(quantized).is_float:
        raise InputError(
            "the original model comes first, but this is a quantized one",
            where=str(base.path),
            hint=f"qtool eval {quantized.path} {base.path}",
        )


_SAME = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


def _check_same_model(base: Checkpoint, quantized: Checkpoint) -> None:
    """By what both config.json files say; what they leave out, the comparison itself finds out."""
    one, other = (checkpoint.config.get("text_config") or checkpoint.config for checkpoint in (base, quantized))
    for key in _SAME:
        if key in one and key in other and one[key] != other[key]:
            raise InputError(
                f"these are different models: {key} is {one[key]} and {other[key]}",
                where=f"{base.path} and {quantized.path}",
                hint="give the model that the quantized one was made from",
            )


def _are_equal(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether all is the same. The first byte that differs ends the search, so only equal files are read whole."""
    files, others = ({it.info(name).file.name: it.info(name).file for name in it.names} for it in (one, other))
    if files.keys() != others.keys() or one.config != other.config:
        return False
    return all(filecmp.cmp(files[name], others[name], shallow=False) for name in files)


def comparison(
    models: Models, text: EvaluationText, runtime: Literal["qtool", "vllm"], *, trust_remote_code: bool
) -> ComparisonJob:
    """The job that compares them.

    Args:
        text: a file's path may be relative, or begin with ~.
        runtime: who runs the quantized models.

    Raises:
        InputError: no vLLM here, or none that can.
    """
    vllm = tuple(vllm_for(checkpoint) for checkpoint in models.quantized) if runtime == "vllm" else ()
    if len({(each.python, *each.env.items()) for each in vllm}) > 1:
        raise InputError("vLLM needs other settings for each of these models", hint="compare them one at a time")
    return ComparisonJob(
        base=models.base.path,
        quantized=tuple(checkpoint.path for checkpoint in models.quantized),
        text=replace(text, data=absolute(text.data)),
        vllm=vllm,
        trust_remote_code=trust_remote_code,
    )


def vllm_for(checkpoint: Checkpoint) -> Vllm:
    """vLLM on this machine, as it runs this checkpoint.

    Raises:
        InputError: only a plugin of vLLM's can, or vLLM would compute something else than the checkpoint says.
    """
    format = formats.of(checkpoint).name
    chosen = runtimes.choose("vllm", format)
    if chosen.name != "vllm":
        raise InputError(
            f"vLLM reads {format} checkpoints through {chosen.name} only, whose logits it can't have",
            where="--runtime",
            hint="leave out --runtime: qtool computes what that runtime does with the same integers",
        )
    chosen = runtimes.adapted(chosen, checkpoint)
    if chosen.otherwise is not None:
        hint = "Leave out --runtime: qtool computes what the checkpoint says. For --tasks, quantize without --kv-cache."
        raise InputError(chosen.otherwise, where=str(checkpoint.path), hint=hint)
    engine = chosen.engine | {"dtype": dtype(checkpoint, runtimes.kind_of(chosen.name))}
    return Vllm(chosen.python, engine, {**chosen.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
