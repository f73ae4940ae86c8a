"""What is wrong with a recipe, in plain words and with the file, line and key as they are written."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from qtool.recipe.policy import Policy
from qtool.recipe.schema import Recipe
from qtool.recipe.words import WRONG, worded
from qtool.recipe.yaml import Path, Problem, dotted

Places = Mapping[Path, tuple[str, int]]
"""For every path of a recipe the file and line that it comes from."""

_WRAPPERS = (typing.Annotated, typing.Union, types.UnionType)


def problems_of(error: pydantic.ValidationError, places: Places) -> list[Problem]:
    """What pydantic found, with the places in the files and in plain words."""
    return [_problem(item, places) for item in error.errors(include_url=False)]


def _problem(item: Any, places: Places) -> Problem:
    kind, context = item["type"], item.get("ctx", {})
    path, around = _path(item["loc"])
    if kind == WRONG:
        path = (*path, context["key"])
    elif kind == "union_tag_invalid":
        path = (*path, context["discriminator"].strip("'"))
    path, (file, line) = _as_written(path, places)
    if kind == "union_tag_not_found":
        path = (*path, context["discriminator"].strip("'"))
    return Problem(line, dotted(path), _message(item, str(path[-1]) if path else "", around), file)


def _message(item: Any, key: str, around: Any) -> str:
    """What is wrong with a key in a mapping of the type `around`."""
    if item["type"] == "extra_forbidden":
        known = _keys(around)
        close = difflib.get_close_matches(key, known, n=1)
        return f"unknown key; {f'did you mean {close[0]!r}?' if close else 'known are ' + ', '.join(known)}"
    return worded(item)


def _path(location: Sequence[int | str]) -> tuple[Path, Any]:
    """A place that pydantic names, without the methods that it puts between; and the type around the last key.

    Found by walking the schema's annotations.
    """
    path: Path = ()
    current: Any = Recipe
    around = current
    for part in location:
        around = current
        if methods := _methods(current):  # a union told apart by a method's name, which is no key of the file
            current = methods[str(part)]
            continue
        if isinstance(current, type) and issubclass(current, pydantic.BaseModel):
            current = current.model_fields[str(part)].annotation if part in current.model_fields else None
        else:
            current = (typing.get_args(current) or (None,))[-1]
        while typing.get_origin(current) in _WRAPPERS and not _methods(current):
            current = typing.get_args(current)[0]
        path = (*path, part)
    return path, around


def _methods(annotation: Any) -> dict[str, type[pydantic.BaseModel]]:
    """The members of a union by the names that tell them apart; empty for anything else."""
    members = typing.get_args(annotation) if typing.get_origin(annotation) in _WRAPPERS else ()
    if len(members) < 2 or not all(isinstance(m, type) and issubclass(m, pydantic.BaseModel) for m in members):
        return {}
    return {typing.get_args(next(iter(m.model_fields.values())).annotation)[0]: m for m in members}


def _keys(model: Any) -> list[str]:
    """The keys that the schema knows in a mapping of this type."""
    if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
        return []
    more = {Recipe: ["extends"], Policy: ["scheme"]}
    return [*model.model_fields, *more.get(model, [])]


def _as_written(path: Path, places: Places) -> tuple[Path, tuple[str, int]]:
    """The key as the file has it, which may be in a shorter or an earlier spelling, and its file and line."""
    for spelling in (path, *_spellings(path)):
        if spelling in places:
            return spelling, places[spelling]
    place = path
    while place and place not in places:
        place = place[:-1]
    return path, places.get(place, ("", 1))


def _spellings(path: Path) -> list[Path]:
    match path:
        case (*before, "smoothing", "alpha"):
            return [(*before, "smoothquant_alpha")]
        case (*before, "observer", "percentile"):
            return [(*before, "percentile")]
        case (*before, "method" | "mode"):
            return [tuple(before)]
    return []
