"""The user's configuration file: where it is, what it says, and on which line.

TOML, because Python reads it by itself and because a path in it is a string and nothing else:

    [quantize]
    samples = 64
    format = "compressed-tensors"

    [environments]
    golden-stick = "/opt/mindspore/bin/python"

A table with a command's name has the defaults of its options (`qtool.cli.defaults`); `environments` has interpreters
(`qtool.environments.settings`).
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from qtool.errors import InputError
from qtool.files import expand


def config_file() -> Path:
    """The file that QTOOL_CONFIG names, or config.toml in the user's configuration folder, which need not exist."""
    if named := os.environ.get("QTOOL_CONFIG"):
        return expand(named).absolute()
    from platformdirs import user_config_path  # here: workers' interpreters import this module and need not have it

    return user_config_path("qtool") / "config.toml"


def read() -> dict[str, Any]:
    """What the file says; nothing without a file.

    Raises:
        InputError: it can't be read or is not TOML, or QTOOL_CONFIG names none.
    """
    file = config_file()
    try:
        with file.open("rb") as handle:
            return tomllib.load(handle)
    except (FileNotFoundError, NotADirectoryError):
        if os.environ.get("QTOOL_CONFIG"):
            where, hint = f"QTOOL_CONFIG={file}", "Correct or unset QTOOL_CONFIG."
            raise InputError("no such configuration file", where=where, hint=hint) from None
        return {}
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(file)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid TOML: {error}", where=str(file), hint="Correct or remove the file.") from None


def place(*keys: str) -> str:
    """Where the file says something: FILE, line N. `keys` lead there, as in `place("quantize", "samples")`."""
    file = config_file()
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    number = _line(lines, list(keys))
    return str(file) if number is None else f"{file}, line {number}"


def _line(lines: list[str], keys: list[str]) -> int | None:
    """The number, from 1, of the line that sets the keys' value, or else of their table's title."""
    table: list[str] = []
    title = None
    for number, line in enumerate(lines, 1):
        if found := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = _parts(found[1])
            if table == keys[: len(table)] and len(table) >= len(keys) - 1:
                title = number
        elif found := re.match(r"\s*([^=#]+?)\s*=", line):
            whole = [*table, *_parts(found[1])]
            if whole == keys:
                return number
            if title is None and whole[: len(keys)] == keys:
                title = number
    return title


def _parts(name: str) -> list[str]:
    return [part.strip().strip("\"'") for part in name.split(".")]
