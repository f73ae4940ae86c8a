"""The recipe's JSON Schema, for editors that check YAML: `# yaml-language-server: $schema=FILE` on the first line."""

from __future__ import annotations

from typing import Any

from qtool.recipe.schema import Recipe
from qtool.scheme import PRESETS

_EXTENDS = {
    "type": "string",
    "description": "a recipe's name, or a path relative to this file: all that isn't said here",
}
_SCHEME = {
    "anyOf": [{"enum": list(PRESETS)}, {"type": "string", "pattern": r"^.+-(g[1-9][0-9]*|channel)$"}],
    "description": "says weights and activations at once",
}


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """What a recipe's file may say, in the spellings of today; `qtool recipes validate` knows the older ones too."""
    schema = untitled(Recipe.model_json_schema())
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    schema["required"].remove("schemes")
    schema["anyOf"] = [{"required": ["extends"]}, {"required": ["schemes"]}]
    schema["$defs"]["Policy"]["properties"]["scheme"] = _SCHEME
    return {"$schema": DIALECT, "title": "qtool recipe", **schema}


def untitled(schema: Any) -> Any:
    """Without titles, which only repeat the keys."""
    if isinstance(schema, list):
        return [untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: untitled(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
