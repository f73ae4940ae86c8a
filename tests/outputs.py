"""What commands print with --json, held against the schemas: `run_qtool` does so wherever a test asks for JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import jsonschema

from qtool.cli import schema

LINES = {"inspect-tensors", "generate"}  # one document on each line
OPEN = {"generate"}  # an answer carries the fields of its prompt
WITHOUT = {"recipes-show", "env-path", "env-install", "env-remove", "serve", "schema", "upload-dry-run", "None"}


def check(args: Sequence[Any], stdout: str) -> str | None:
    """The name of the schema that this output was held against, if there is one.

    Raises:
        jsonschema.ValidationError: a key is missing, is none of the schema's, or has a value of another type.
    """
    words = [str(word) for word in args]
    if "--json" not in words or not stdout.strip():
        return None
    name = _name(words)
    if name in WITHOUT or _is_batch(stdout):
        return None
    documents = (
        [json.loads(line) for line in stdout.rstrip("\n").split("\n")] if name in LINES else [json.loads(stdout)]
    )
    for document in documents:
        failed = isinstance(document, dict) and isinstance(document.get("error"), dict)
        validator("error" if failed else name).validate(document)
    return name


def _name(words: Sequence[str]) -> str:
    command = words[0]
    if command in ("recipes", "env"):
        return f"{command}-{words[1]}"
    if command == "runtimes":
        return command if {*words[1:]} <= {"--json", "--quiet", "-q"} else "runtimes-model"
    for option in ("tasks", "dry-run", "tensors"):
        if f"--{option}" in words and command != "download":
            return f"{command}-{option}"
    return command


def _is_batch(stdout: str) -> bool:
    return '"custom_id"' in stdout.partition("\n")[0]


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """Of the schema, with the keys that it doesn't name forbidden: nothing is printed that isn't documented."""
    found = schema.json_schema(name)
    return jsonschema.Draft202012Validator(found if name in OPEN else _closed(found))


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    return (
        {"additionalProperties": False, **closed} if "properties" in node and node.get("type") == "object" else closed
    )
