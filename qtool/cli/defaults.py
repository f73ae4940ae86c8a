"""Defaults of options that the user sets: in the configuration file, a table for each command, or in variables.

The command line wins over a variable, QTOOL_QUANTIZE_SAMPLES, that over the file, and that over what is built in.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from qtool import configuration
from qtool.cli.helptexts import placeholder
from qtool.environments import settings
from qtool.environments.table import ENGINES
from qtool.errors import InputError

PREFIX = "QTOOL"
_KINDS: dict[str, tuple[str, Any]] = {
    "integer": ("a whole number", int),
    "number": ("a number", (int, float)),
    "boolean": ("true or false", bool),
    "string": ("text in quotes", str),
    "array": ("a list of texts in quotes", list),
}


def of(command: Any, *names: str) -> dict[str, Any]:
    """The file's defaults of a command, as a `default_map`: by parameter, or by command for a group of commands.

    Args:
        command: the command or group.
        names: what it is called, `quantize` or `env`, `install`.

    Raises:
        InputError: the file can't be read, or has what this command doesn't know, with the line.
    """
    table: Any = configuration.read()
    for name in names:
        table = table.get(name, {})
        if not isinstance(table, dict):
            where = configuration.place(*names)
            raise InputError(f"{name} is not a table", where=where, hint=f"Write [{'.'.join(names)}] on a line.")
    inner = getattr(command, "commands", None)
    known = options(command) if inner is None else inner
    for key in table:
        if key not in known:
            kind = "option" if inner is None else "command"
            raise InputError(
                f"{' '.join(('qtool', *names))} has no {kind} {key!r}",
                where=configuration.place(*names, key),
                hint=_nearest(key, known),
            )
    if inner is not None:
        return {name: of(inner[name], *names, name) for name in table}
    return {known[key].name: _checked(value, known[key], (*names, key)) for key, value in table.items()}


def check_tables(commands: Mapping[str, object]) -> None:
    """Refuse what is a table of no command. Raises InputError."""
    for name in configuration.read():
        if name not in commands and name != settings.TABLE:
            raise InputError(
                f"there is no command {name!r}",
                where=configuration.place(name),
                hint=f"{_nearest(name, [*commands, settings.TABLE])} Options stand in a table: [quantize].",
            )


def variables(command: Any, *names: str) -> Iterator[tuple[str, str, str]]:
    """The variables that are set for a command's options: option, value, variable."""
    for name, param in options(command).items():
        variable = "_".join((PREFIX, *names, str(param.name))).upper().replace("-", "_")
        if value := os.environ.get(variable):
            yield name, value, variable


def options(command: Any) -> dict[str, Any]:
    """A command's options by their long names, without dashes."""
    return {
        opt.removeprefix("--"): param
        for param in command.params
        if param.param_type_name == "option" and param.name != "help"
        for opt in param.opts
        if opt.startswith("--")
    }


def json_schema(commands: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of the file, for editors. `commands` are all commands and groups, by name."""
    engines = {"description": "the Python interpreter for each engine or runtime", **_table(ENGINES, _path)}
    return _table({settings.TABLE: engines, **commands}, lambda each: each if isinstance(each, dict) else _schema(each))


def _schema(command: Any) -> dict[str, Any]:
    if (inner := getattr(command, "commands", None)) is not None:
        return _table(inner, _schema)
    return {"description": command.help.split("\n\n")[0].replace("\n", " "), **_table(options(command), _value)}


def _table(entries: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    properties = {name: schema(entry) for name, entry in entries.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _path(_: object) -> dict[str, Any]:
    return {"type": "string"}


def _value(param: Any) -> dict[str, Any]:
    """The JSON Schema of an option's value."""
    kind = param.type_descriptor
    name = param.bare_type().removeprefix("list[").removesuffix("]")
    bare = {"int": "integer", "float": "number"}.get(name, "string")
    schema: dict[str, Any] = {"type": "boolean" if param.is_flag else bare}
    if kind.is_choice and not param.is_flag:
        schema["enum"] = list(kind.choices)
    for bound, word in ((param.min, "minimum"), (param.max, "maximum")):
        if bound is not None:
            schema[word] = bound
    if param.multiple:
        schema = {"type": "array", "items": schema}
    return {"description": param.help, **schema}


def _checked(value: Any, param: Any, keys: tuple[str, ...]) -> Any:
    schema = _value(param)
    words, kind = _KINDS[schema["type"]]
    right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not right or value not in schema.get("enum", [value]) or not _within(value, schema):
        wanted = placeholder(param) if "enum" in schema else words
        lowest, highest = schema.get("minimum"), schema.get("maximum")
        wanted += "" if lowest is None else f", at least {lowest}"
        wanted += "" if highest is None else f", at most {highest}"
        raise InputError(f"{keys[-1]} is {value!r}", where=configuration.place(*keys), hint=f"Write {wanted}.")
    return value


def _within(value: Any, schema: Mapping[str, Any]) -> bool:
    if schema["type"] == "array":
        return all(isinstance(each, str) for each in value)
    return schema.get("minimum", value) <= value <= schema.get("maximum", value)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}."
