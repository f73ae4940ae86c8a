"""Which interpreter has an engine. Nothing is imported, and nothing run, to find out."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from qtool.environments import settings, store
from qtool.environments.table import ENGINES, Engine
from qtool.errors import InputError


@dataclass(frozen=True)
class Located:
    """An interpreter for an engine.

    Args:
        python: its path.
        source: who says so: a variable's name, the configuration file, "this interpreter" or "environment NAME".
    """

    python: str
    source: str


def interpreter(engine: str) -> str:
    """The path of the interpreter for `engine`, a key of ENGINES.

    Raises:
        InputError: there is none (the hint has the command that makes one), or the user names what is no program.
    """
    found = locate(engine)
    if found is None:
        wanted = ENGINES[engine]
        raise InputError(
            f"{engine} needs the Python package {wanted.package}, which is not installed", hint=install_hint(wanted)
        )
    return found.python


def locate(engine: str) -> Located | None:
    """Where `engine` would run: as the user says, else here if it is installed here, else a managed environment.

    Raises:
        InputError: the user's word for it (`QTOOL_<ENGINE>_PYTHON` or the configuration file) is no program.
    """
    wanted = ENGINES[engine]
    if named := settings.named_interpreter(engine):
        return Located(*named)
    if available(wanted.package):
        return Located(sys.executable, "this interpreter")
    for name in wanted.environments():
        if python := store.python(name):
            return Located(str(python), f"environment {name}")
    return None


def install_hint(engine: Engine) -> str:
    """How to get what `engine` needs, in one line."""
    variable = settings.variable(engine.name)
    return f"Install it: {install_command(engine)}  (or name an interpreter that has it: {variable})"


def install_command(engine: Engine) -> str:
    """The command that brings what `engine` needs: qtool's own extra, else a managed environment."""
    if engine.extra is None:
        return f"qtool env install {engine.environments()[0]}"
    return extra_command(engine.extra)


def extra_command(extra: str) -> str:
    """The command that adds an extra to the installation of qtool that runs, by the tool that made it."""
    wanted = f"'qtool[{extra}]'"
    if "pipx" in sys.prefix.split("/"):
        return f"pipx runpip qtool install {wanted}"
    if not available("pip") and _made_by_uv(Path(sys.prefix)):
        return f"uv pip install --python {shlex.quote(sys.executable)} {wanted}"
    return f"pip install {wanted}"


def _made_by_uv(environment: Path) -> bool:
    """Whether a virtual environment is uv's, which has no pip: uvx, `uv tool install` and `uv venv` make such ones."""
    try:
        text = (environment / "pyvenv.cfg").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return any(line.partition("=")[0].strip() == "uv" for line in text.splitlines())


def available(package: str) -> bool:
    """Whether the current interpreter can find `package`, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
