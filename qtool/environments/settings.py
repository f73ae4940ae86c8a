"""What the user says about interpreters: in variables of the environment, or in the configuration file.

[environments]
golden-stick = "/opt/mindspore/bin/python"
"""

from __future__ import annotations

import os
from typing import Any

from qtool import configuration
from qtool.environments.table import ENGINES
from qtool.errors import InputError

TABLE = "environments"


def variable(engine: str) -> str:
    """The variable that names the interpreter for `engine`."""
    return f"QTOOL_{engine.upper().replace('-', '_')}_PYTHON"


def named_interpreter(engine: str) -> tuple[str, str] | None:
    """The interpreter that the user names for `engine`, and where; the variable wins over the file.

    Raises:
        InputError: what is named is no program, or the file can't be understood.
    """
    name = variable(engine)
    if value := os.environ.get(name):
        _check(value, where=f"{name}={value}", hint=f"Correct or unset {name}.")
        return value, name
    if value := interpreters(configuration.read()).get(engine):
        python = os.path.expanduser(value)
        where = f"{configuration.place(TABLE, engine)}: {engine} = {value!r}"
        if not os.path.isabs(python):
            raise InputError("not an absolute path", where=where, hint="Write the interpreter's whole path.")
        _check(python, where=where, hint="Correct or remove the line.")
        return python, str(configuration.config_file())
    return None


def interpreters(content: dict[str, Any]) -> dict[str, str]:
    """The table `environments` of a configuration. Raises InputError for what is no interpreter of an engine."""
    table = content.get(TABLE, {})
    if not isinstance(table, dict):
        where = configuration.place(TABLE)
        raise InputError("environments is not a table", where=where, hint="Write [environments] on a line.")
    for key, value in table.items():
        where = configuration.place(TABLE, key)
        if key not in ENGINES:
            raise InputError(f"unknown engine {key!r}", where=where, hint=f"One of {', '.join(ENGINES)}.")
        if not isinstance(value, str):
            raise InputError("not a path in quotes", where=f"{where}: {key}")
    return table


def _check(python: str, *, where: str, hint: str) -> None:
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise InputError("not a Python interpreter", where=where, hint=hint)
