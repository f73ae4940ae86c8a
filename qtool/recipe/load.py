"""Finding recipes, reading them with errors that name file, line and key, and matching them to a model.

A recipe may say `extends: NAME` (or a path relative to its own file): it then starts as that recipe, without
its name, description, model and match. Mappings are merged key by key, everything else (a scheme's list of policies,
for one) is replaced.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import pydantic
import yaml as pyyaml

from qtool import resources
from qtool.errors import InputError
from qtool.files import expand, real
from qtool.recipe.problems import problems_of
from qtool.recipe.schema import Recipe
from qtool.recipe.yaml import MAX_BYTES, Path, Problem, dotted, parse

SUFFIXES = (".yaml", ".yml")
_MOST_EXTENDS = 16
_SHOWN = 3  # problems that an error message lists
_OWN_KEYS = ("name", "description", "model", "match", "extends")


class RecipeError(InputError):
    """What is in a recipe is wrong: `problems` has everything, the message the first few."""

    def __init__(self, problems: Sequence[Problem], where: str) -> None:
        self.problems = sorted(problems, key=lambda p: (p.file != where, p.file, p.line))
        first = self.problems[0]
        if len(self.problems) == 1:
            super().__init__(_keyed(first), where=f"{first.file}:{first.line}")
            return
        shown = "; ".join(
            f"{f'line {p.line}' if p.file == where else f'{p.file}:{p.line}'}: {_keyed(p)}"
            for p in self.problems[:_SHOWN]
        )
        more = "" if len(self.problems) <= _SHOWN else f"; and {len(self.problems) - _SHOWN} more"
        what = f"{len(self.problems)} problems: {shown}{more}"
        super().__init__(what, where=where, hint=f"all of them: qtool recipes validate {where}" if more else None)


def _keyed(problem: Problem) -> str:
    return f"{problem.key}: {problem.message}" if problem.key else problem.message


@dataclass(frozen=True)
class _Source:
    """Parsed text, before validation.

    Attributes:
        data: what the files say; None where one of them can't be understood at all.
        lines: for every path of it the file and line that it comes from.
        files: all files read.
        problems: what is wrong with the text itself.
    """

    data: dict[str, Any] | None
    lines: dict[Path, tuple[str, int]]
    files: tuple[str, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Located:
    """A recipe, and for every path of it the file and line that it comes from."""

    recipe: Recipe
    places: Mapping[Path, tuple[str, int]]

    def problem(self, path: Path, message: str) -> Problem | None:
        """What is wrong with the value at this path; None for one that no file says."""
        if path not in self.places:
            return None
        file, line = self.places[path]
        return Problem(line, dotted(path), message, file)


def names() -> list[str]:
    """The names of the recipes shipped with qtool, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.folder("recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def load(name_or_path: str | os.PathLike[str]) -> Recipe:
    """The recipe of this name, or in this file. A value with a slash or ending in .yaml or .yml is a file.

    Raises:
        InputError: no such recipe or file, or what is in it is not a valid recipe; several problems at once.
    """
    return located(name_or_path).recipe


def located(name_or_path: str | os.PathLike[str]) -> Located:
    """The same, with the places of what it says. Raises InputError as `load`."""
    source, where = _read(os.fspath(name_or_path), seen=())
    return Located(_validate(source, where), source.lines)


def files(name_or_path: str | os.PathLike[str]) -> list[FilePath]:
    """The recipe's file and those that it extends, all links resolved; shipped recipes by a relative path.

    Raises:
        InputError: as `load`.
    """
    source, _ = _read(os.fspath(name_or_path), seen=())
    return [FilePath(file) for file in source.files]


def resolved(name_or_path: str | os.PathLike[str]) -> str:
    """The recipe as YAML with `extends` resolved and the defaults left out; it loads to the same recipe.

    Raises:
        InputError: as `load`.
    """
    recipe = load(name_or_path)
    data = recipe.model_dump(mode="json", exclude_unset=True)
    return pyyaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)


def match(config: Mapping[str, Any]) -> tuple[Recipe, str]:
    """The shipped recipe that fits a model's config.json best, and why, as one line.

    A recipe fits when each config.json key it names has the value, or one of the values, that it gives; the one
    that names the most keys wins (the first by name among equals). `default` names none, so it fits every model.
    """
    best: tuple[int, Recipe, list[str]] | None = None
    for name in names():
        recipe = load(name)
        reasons = _fits(recipe, config)
        if reasons is not None and (best is None or len(reasons) > best[0]):
            best = (len(reasons), recipe, reasons)
    if best is None:
        raise InputError(
            f"no recipe fits model_type {config.get('model_type')!r}", hint="choose one with --recipe NAME|FILE"
        )
    _, recipe, reasons = best
    if reasons:
        return recipe, ", ".join(reasons)
    return recipe, f"no recipe is more specific to model_type {config.get('model_type')!r}"


def _fits(recipe: Recipe, config: Mapping[str, Any]) -> list[str] | None:
    wanted: dict[str, Any] = dict(recipe.match.config)
    if recipe.match.model_type:
        wanted = {"model_type": recipe.match.model_type, **wanted}
    reasons = []
    for key, values in wanted.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (values if isinstance(values, list) else [values]):
            return None
        reasons.append(f"{key} is {value}")
    return reasons


def _is_file(name_or_path: str) -> bool:
    return os.sep in name_or_path or "/" in name_or_path or name_or_path.endswith(SUFFIXES)


def _read(name_or_path: str, seen: Sequence[str]) -> tuple[_Source, str]:
    if _is_file(name_or_path):
        where, text = name_or_path, _read_file(expand(name_or_path))
        identity = str(real(expand(name_or_path)))
    else:
        where = identity = f"recipes/{name_or_path}.yaml"
        if name_or_path not in names():
            raise _unknown_name(name_or_path)
        text = (resources.folder("recipes") / f"{name_or_path}.yaml").read_bytes()
    if identity in seen:
        raise InputError("recipes extend each other in a circle: " + " → ".join([*seen, identity]), where=where)
    if len(seen) > _MOST_EXTENDS:
        raise InputError(f"recipes extend each other more than {_MOST_EXTENDS} times in a row", where=where)
    document = parse(text)
    if not document.problems and not isinstance(document.data, dict):
        document.problems.append(Problem(1, "", "a recipe must be a mapping of keys to values"))
    lines = {path: (where, line) for path, line in document.lines.items()}
    problems = tuple(replace(problem, file=where) for problem in document.problems)
    if not isinstance(document.data, dict):
        return _Source(None, lines, (identity,), problems), where
    source = _Source(document.data, lines, (identity,), problems)
    base = document.data.pop("extends", None)
    if base is None:
        return source, where
    line = document.lines["extends",]
    if not isinstance(base, str):
        wrong = Problem(line, "extends", "must be the name or the path of a recipe", where)
        return replace(source, data=None, problems=(*problems, wrong)), where
    if _is_file(base) and not os.path.isabs(base):
        base = str(expand(where).parent / base)
    try:
        inherited, _ = _read(base, seen=(*seen, identity))
    except InputError as error:
        if error.where is None:  # no such recipe: say who asked for it
            error.where = f"{where}:{line}: extends"
        raise
    return _merge(inherited, source), where


def _read_file(path: FilePath) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(
            "no such recipe file", where=str(path), hint="shipped recipes: " + ", ".join(names())
        ) from None
    except OSError as error:
        raise InputError(f"can't read the recipe: {error.strerror}", where=str(path)) from None


def _unknown_name(name: str) -> InputError:
    close = difflib.get_close_matches(name, names(), n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    hint = f"{guess}shipped: {', '.join(names())}; a file is given by its path, ending in .yaml"
    return InputError(f"no recipe is named {name!r}", hint=hint)


def _merge(base: _Source, child: _Source) -> _Source:
    lines: dict[Path, tuple[str, int]] = {}

    def merge(below: Any, above: Any, path: Path) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            lines[path] = child.lines.get(path, base.lines.get(path, ("", 1)))
            result = {}
            for key in [*below, *(key for key in above if key not in below)]:
                inner = (*path, key)
                if key in below and key in above:
                    result[key] = merge(below[key], above[key], inner)
                else:
                    result[key] = take(below if key in below else above, key, inner, key in above)
            return result
        keep(path, child)
        return above

    def take(mapping: dict[str, Any], key: str, path: Path, from_child: bool) -> Any:
        keep(path, child if from_child else base)
        return mapping[key]

    def keep(path: Path, source: _Source) -> None:
        lines.update({p: place for p, place in source.lines.items() if p[: len(path)] == path})

    files, problems = (*child.files, *base.files), (*child.problems, *base.problems)
    if base.data is None or child.data is None:
        return _Source(None, lines, files, problems)
    inherited = {key: value for key, value in base.data.items() if key not in _OWN_KEYS}
    merged = merge(inherited, child.data, ())
    order = [*_OWN_KEYS, *(key for key in merged if key not in _OWN_KEYS)]
    return _Source({key: merged[key] for key in order if key in merged}, lines, files, problems)


def _validate(source: _Source, where: str) -> Recipe:
    problems = list(source.problems)
    try:
        recipe = None if source.data is None else Recipe.model_validate(source.data)
    except pydantic.ValidationError as error:
        told = {(problem.file, problem.key) for problem in problems}
        found = [replace(problem, file=problem.file or where) for problem in problems_of(error, source.lines)]
        problems += [problem for problem in found if (problem.file, problem.key) not in told]
        recipe = None
    if recipe is None or problems:
        raise RecipeError(problems, where)
    return recipe
