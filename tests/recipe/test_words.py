"""Errors of values in plain words: nothing that pydantic itself says comes through, whatever kind it is."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from pydantic_core import _pydantic_core, core_schema

from qtool.recipe.schema import Recipe
from qtool.recipe.words import WRONG, worded

EVERY: dict[str, Any] = {str(error["type"]): error for error in _pydantic_core.list_all_errors()}
PYDANTIC = (
    "Input",
    "Value error",
    "Assertion",
    "should",
    "valid",
    "parse",
    "dictionary",
    "{",
    "}",
    "pydantic",
    "Field",
)


@pytest.mark.parametrize("kind", sorted(EVERY))
def test_every_kind_has_words(kind: str) -> None:
    context = EVERY[kind].get("example_context") or {}
    context = {key: value if value not in ("", None) else "THIS" for key, value in context.items()}
    said = worded({"type": kind, "input": "given", "ctx": context, "msg": "Input should be of pydantic's words"})
    assert said.strip()
    assert not [word for word in PYDANTIC if word in said], said
    assert said[0].islower() or said == "THIS"


def kinds(schema: Any) -> set[str]:
    """The types of all core schemas inside one."""
    if isinstance(schema, dict):
        own = {schema["type"]} if isinstance(schema.get("type"), str) else set()
        return own.union(*(kinds(value) for value in schema.values()))
    if isinstance(schema, list | tuple):
        return set().union(*(kinds(value) for value in schema))
    return set()


def test_what_recipes_are_made_of_has_words_of_its_own() -> None:
    """Each scalar and container that a key can be, given what it can't be."""
    fallback = worded({"type": "callable_type", "input": 1})
    assert fallback == "can't be 1"
    used = kinds(Recipe.__pydantic_core_schema__)
    assert {"str", "int", "float", "bool", "list", "dict", "literal", "tagged-union", "model"} <= used
    for schema in (
        core_schema.str_schema(min_length=2, max_length=3, pattern="^a+$"),
        core_schema.int_schema(ge=1, lt=5),
        core_schema.float_schema(gt=1, le=5, allow_inf_nan=False),
        core_schema.bool_schema(),
        core_schema.list_schema(core_schema.int_schema(), min_length=2, max_length=2),
        core_schema.dict_schema(core_schema.str_schema(), core_schema.int_schema(), min_length=2),
        core_schema.literal_schema(["a", "b"]),
        core_schema.nullable_schema(core_schema.int_schema()),
    ):
        validator = _pydantic_core.SchemaValidator(schema)
        for value in (
            "",
            "a",
            "b" * 9,
            0,
            9,
            1.5,
            float("inf"),
            None,
            True,
            [],
            [1],
            ["x"],
            [1, 2, 3],
            {},
            {1: "x"},
            "9" * 5000,
        ):
            try:
                validator.validate_python(value)
            except pydantic.ValidationError as error:
                for item in error.errors(include_url=False):
                    said = worded(item)
                    assert said.startswith("must "), (item["type"], said)


def test_ours_are_said_as_they_are() -> None:
    assert worded({"type": WRONG, "input": 1, "ctx": {"key": "a", "message": "is {odd}"}}) == "is {odd}"
    assert worded({"type": "value_error", "input": 1, "ctx": {"error": ValueError("is {odd}")}}) == "is {odd}"
