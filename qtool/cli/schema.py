"""`qtool schema`: JSON Schemas of recipes, of the configuration file, and of what commands print."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qtool.cli.options import Debug, Json, Quiet, console
from qtool.errors import InputError

RECIPE, CONFIGURATION = "recipe", "configuration"


def names() -> list[str]:
    """Of all schemas."""
    from qtool.printed import SCHEMAS

    return [RECIPE, CONFIGURATION, *SCHEMAS]


def json_schema(name: str) -> dict[str, Any]:
    """One of them.

    Raises:
        InputError: there is none of this name.
    """
    from pydantic import TypeAdapter

    from qtool.printed import SCHEMAS
    from qtool.recipe import editors

    if name == RECIPE:
        return editors.json_schema()
    if name == CONFIGURATION:
        from qtool.cli import app, defaults

        commands = {name: app.load(name) for name in app.COMMANDS}
        return {"$schema": editors.DIALECT, "title": "qtool configuration", **defaults.json_schema(commands)}
    if name not in SCHEMAS:
        raise InputError(f"there is no schema {name!r}", hint=f"One of {', '.join(names())}.")
    found = editors.untitled(TypeAdapter(SCHEMAS[name]).json_schema())
    return {"$schema": editors.DIALECT, "title": f"qtool {name}", **found}


def _complete(incomplete: str) -> list[str]:
    return [name for name in names() if name.startswith(incomplete)]


def schema(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="The name of a schema. Without it, the names are listed.", autocompletion=_complete
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of recipes, of the configuration file, or of what a command prints with --json.

    Editors use the schema of recipes to check and complete them. Write it to a file, and put this line at the top of a
    recipe: `# yaml-language-server: $schema=FILE`. For the configuration file, the line is `#:schema FILE`. With
    --json, all commands print an error as `qtool schema error` says.

    Examples:

      qtool schema

      qtool schema recipe > recipe.schema.json

      qtool schema eval
    """
    out = console()
    if name is None:
        out.result(names() if json else "\n".join(names()))
    else:
        out.result(json_schema(name))
