"""What this machine has, and which engines and runtimes would work on it: they are tried, each in its interpreter."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

from qtool import workers
from qtool.environments import lookup, machine, store
from qtool.environments.table import ENGINES, Engine
from qtool.errors import InputError, QtoolError, in_one_line
from qtool.files import free_space
from qtool.version import __version__

PROBE = "qtool.environments.probe"
PROBE_SECONDS = 120.0


def examine(on_event: Callable[[workers.Event], None], timeout: float = PROBE_SECONDS) -> dict[str, Any]:
    """Everything `qtool doctor` reports.

    Args:
        on_event: gets progress, as a worker's events.
        timeout: seconds that one engine has to answer.

    Returns:
        qtool, python, machine (see `describe`); engines: a list of what `try_engine` returns; works: whether
        one engine and one runtime at least work; to_do: the command to start with where they don't, else None.
    """
    engines = []
    for done, engine in enumerate(ENGINES.values()):
        stage = "trying engines and runtimes"
        on_event({"event": "progress", "stage": stage, "done": done, "total": len(ENGINES), "unit": "of them"})
        engines.append(try_engine(engine, timeout))
    working = {row["kind"] for row in engines if row["works"]}
    return {
        "qtool": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": describe(),
        "engines": engines,
        "works": {"engine", "runtime"} <= working,
        "to_do": None if {"engine", "runtime"} <= working else _first_step(engines, working),
    }


def _first_step(engines: list[dict[str, Any]], working: set[str]) -> str:
    """The one command that helps most where no engine or no runtime works: for the first of them, which needs least."""
    steps = (row["missing"] for row in engines if row["kind"] not in working and row["missing"])
    return next(steps, "see what is said above")


def describe() -> dict[str, Any]:
    """System, cpus, memory (bytes), disk (the environments' folder and the bytes free there), cuda, ascend."""
    return {
        "system": platform.platform(),
        "cpus": machine.cpus(),
        "memory": machine.memory(),
        "disk": {"folder": str(store.root()), "free_bytes": free_space(store.root())},
        "cuda": machine.cuda(),
        "ascend": machine.ascend(),
    }


def try_engine(engine: Engine, timeout: float) -> dict[str, Any]:
    """Whether `engine` works here.

    Returns:
        name, kind, works; python and source: its interpreter and who says so, or None; versions of its packages;
        problem: why it doesn't work, or None; missing: the command or the thing to get for it, or None; note: what
        else there is to know, or None.
    """
    row: dict[str, Any] = {"name": engine.name, "kind": engine.kind, "works": False, "python": None, "source": None}
    row |= {"versions": {}, "problem": None, "missing": None, "note": engine.note}
    try:
        found = lookup.locate(engine.name)
        if found is not None:
            row |= {"python": found.python, "source": found.source}
            job = {"imports": engine.imports}
            answer = workers.run(
                "qtool.environments.probe", job, python=found.python, on_event=_ignore, timeout=timeout
            )
            row |= {"python_version": answer["python"], "versions": answer["versions"], "cuda": answer["cuda"]}
            row |= {"problem": answer["error"] and in_one_line(Exception(answer["error"]))}
            if answer["missing"]:
                row["missing"] = _command_for(answer["missing"], found, engine)
    except InputError as error:
        row |= {"problem": str(error), "missing": error.hint}
        return row
    except QtoolError as error:
        row |= {"problem": str(error), "missing": error.hint}
    lacking = next(_lacking_hardware(engine), None)
    if lacking:
        row["missing"] = lacking
    elif found is None:
        row["missing"] = lookup.install_command(engine)
    row["problem"] = row["problem"] or ("not installed" if found is None else lacking and f"needs {lacking}")
    row["works"] = row["problem"] is None
    return row


def _ignore(event: workers.Event) -> None:
    """A probe has nothing to say before its result."""


def _command_for(module: str, found: lookup.Located, engine: Engine) -> str:
    """What brings a module that is missing in the interpreter found."""
    name = next((name for name in engine.managed if found.source == f"environment {name}"), None)
    if name:
        return f"qtool env remove {name} && qtool env install {name}"
    return f"{found.python} -m pip install {module.partition('.')[0].replace('_', '-')}"


def _lacking_hardware(engine: Engine) -> Iterator[str]:
    if not engine.ascend:
        return
    ascend = machine.ascend()
    if ascend is None or not ascend["devices"]:
        yield "an Ascend NPU and its driver"
    elif ascend["cann"] is None:
        yield "CANN (source its set_env.sh)"
