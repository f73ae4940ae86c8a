"""What the user says about interpreters: in variables of the environment, or in the configuration file.

The file is `config.toml` in the user's configuration folder for qtool:

    [environments]
    golden-stick = "/opt/mindspore/bin/python"

TOML, because Python reads it by itself and because a path in it is a string and nothing else.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from qtool.environments.table import ENGINES
from qtool.errors import InputError


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
    file = config_file()
    if value := _read(file).get(engine):
        python = os.path.expanduser(value)
        where = f"{file}: {engine} = {value!r}"
        if not os.path.isabs(python):
            raise InputError("not an absolute path", where=where, hint="Write the interpreter's whole path.")
        _check(python, where=where, hint="Correct or remove the line.")
        return python, str(file)
    return None


def config_file() -> Path:
    """The user's configuration file, which need not exist."""
    from platformdirs import user_config_path  # here: workers' interpreters import this module and need not have it

    return user_config_path("qtool") / "config.toml"


def _check(python: str, *, where: str, hint: str) -> None:
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise InputError("not a Python interpreter", where=where, hint=hint)


def _read(file: Path) -> dict[str, str]:
    """The table `environments` of the file; empty without the file."""
    try:
        with file.open("rb") as handle:
            content = tomllib.load(handle)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(file)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid TOML: {error}", where=str(file), hint="Correct or remove the file.") from None
    for key in content:
        if key != "environments":
            raise InputError(f"unknown key {key!r}", where=str(file), hint="The only table is [environments].")
    table = content.get("environments", {})
    if not isinstance(table, dict):
        raise InputError("environments is not a table", where=str(file), hint="Write [environments] on a line.")
    for key, value in table.items():
        if key not in ENGINES:
            raise InputError(
                f"unknown engine {key!r}", where=f"{file}: [environments]", hint=f"One of {', '.join(ENGINES)}."
            )
        if not isinstance(value, str):
            raise InputError("not a path in quotes", where=f"{file}: [environments] {key}")
    return table
