"""Sampling: whose word counts. The command line's, then the recipe's, then the model's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from qtool.errors import InputError
from qtool.recipe.schema import Generate, Sampling
from qtool.recipe.words import worded

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

# generation_config.json's name -> vLLM's, for what vLLM takes from there (0.32, ModelConfig.get_diff_sampling_param)
FROM_MODEL = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def validated(given: Mapping[str, Any], option: bool = False) -> dict[str, Any]:
    """`given`, by vLLM's names, as Sampling has it.

    Args:
        option: the names came as options, and errors should call them so.

    Raises:
        InputError: a value that is none, or out of its range.
    """
    try:
        return Sampling.model_validate(given).given()
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else str(first.get("ctx", {}).get("key", ""))
        what = worded(first)
        if option and name:
            raise InputError(f"--{name.replace('_', '-')} {what}") from None
        raise InputError(f"{name}: {what}" if name else what) from None


def of_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's own generation_config.json says; values that make no sense are left out."""
    from qtool.files import read_json

    file = checkpoint.path / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    known = {ours: config[theirs] for theirs, ours in FROM_MODEL.items() if config.get(theirs) is not None}
    sane: dict[str, Any] = {}
    for name, value in known.items():
        try:
            sane |= validated({name: value})
        except InputError:
            continue
    return sane


def of_recipe(checkpoint: Checkpoint) -> Generate:
    """What the recipe that fits the model says, if one does."""
    from qtool.recipe.load import match

    try:
        return match(checkpoint.config)[0].generate
    except InputError:  # no recipe fits
        return Generate()


def merged(*words: Mapping[str, Any]) -> dict[str, Any]:
    """All of them; the last word counts. At temperature 0 only the likeliest token counts, and nothing is drawn."""
    result: dict[str, Any] = {}
    for word in words:
        result |= word
    if result.get("temperature") == 0:
        for name in ("top_p", "top_k", "min_p"):
            result.pop(name, None)
    return result
