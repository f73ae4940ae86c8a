"""`qtool recipes`: list, show and validate recipes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qtool.cli.helptexts import Commands
from qtool.cli.options import Debug, Json, Quiet, console
from qtool.console import visible

app = Commands(
    help="List, show and validate recipes.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


def _names(incomplete: str) -> list[str]:
    from qtool.recipe import load

    return [name for name in load.names() if name.startswith(incomplete)]


@app.command("list")
def list_(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the recipes that come with qtool.

    In a pipe, each recipe is one line with its name. --json gives all details.
    """
    from qtool.recipe import load

    recipes = [load.load(name) for name in load.names()]
    out = console()
    if json:
        keys = {"name", "description", "source", "match", "default_scheme"}
        out.result(
            [recipe.model_dump(mode="json", include=keys) | {"schemes": list(recipe.schemes)} for recipe in recipes]
        )
        return
    if sys.stdout.isatty():
        rows = [(recipe.name, recipe.description, ", ".join(recipe.schemes)) for recipe in recipes]
        out.table("", ["name", "for", "schemes"], rows)
        return
    out.result("\n".join(recipe.name for recipe in recipes))


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or file.", autocompletion=_names)],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print a recipe as YAML.

    It has everything that the recipe inherits, so it is a good start for a recipe of your own.
    """
    from qtool.recipe import load

    out = console()
    out.result(load.load(recipe).model_dump(mode="json") if json else load.resolved(recipe).rstrip("\n"))


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="The recipe files to check.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check recipe files.

    Every problem is printed with its file, line and key. The exit code is 2 if there is any problem.
    """
    from qtool.errors import InputError
    from qtool.recipe import load

    out = console()
    report = []
    for name in files:
        problems: list[dict[str, object]] = []
        try:
            recipe = load.load(name)
            out.info(f"{name}: valid ({recipe.name}: {', '.join(recipe.schemes)})")
        except load.RecipeError as error:
            problems = [{"file": p.file, "line": p.line, "key": p.key, "message": p.message} for p in error.problems]
        except InputError as error:
            problems = [{"file": error.where or name, "line": None, "key": "", "message": error.what}]
        report.append({"file": name, "valid": not problems, "problems": problems})
    found = [problem for item in report for problem in item["problems"]]  # type: ignore[attr-defined]
    if json:
        out.result(report)
    else:
        for problem in found:
            place = ":".join(str(problem[key]) for key in ("file", "line") if problem[key] is not None)
            what = ": ".join(str(problem[key]) for key in ("key", "message") if problem[key])
            print(visible(f"{place}: {what}"), file=sys.stderr)
    if found:
        raise typer.Exit(2)
