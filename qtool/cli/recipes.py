"""`qtool recipes`: list, show and validate recipes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli import completion
from qtool.cli.helptexts import Commands
from qtool.cli.options import Debug, Json, Quiet, console
from qtool.console import visible

if TYPE_CHECKING:
    from qtool.recipe import load
    from qtool.recipe.yaml import Problem

app = Commands(
    help="List, show and validate recipes.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


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
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name or file.", autocompletion=completion.recipes)
    ],
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

    Every problem is printed with its file, line and key. The exit code is 2 if there is any problem. The text files
    that a recipe names must exist, too. Their paths are relative to the current folder.
    """
    out = console()
    report = [_report(name) for name in files]
    if json:
        out.result(report)
    for checked in report:
        if checked["valid"]:
            out.info(f"{checked['file']}: valid ({checked['name']}: {', '.join(checked['schemes'])})")
    found = [problem for checked in report for problem in checked["problems"]]
    if not json:
        for problem in found:
            place = ":".join(str(problem[key]) for key in ("file", "line") if problem[key] is not None)
            what = ": ".join(str(problem[key]) for key in ("key", "message") if problem[key])
            print(visible(f"{place}: {what}"), file=sys.stderr)
    if found:
        raise typer.Exit(2)


def _report(name: str) -> dict[str, Any]:
    """What is printed of one file as JSON."""
    from qtool.errors import InputError
    from qtool.recipe import load

    about: dict[str, Any] = {"name": None, "schemes": []}
    try:
        located = load.located(name)
        about = {"name": located.recipe.name, "schemes": list(located.recipe.schemes)}
        problems = [_shown(problem) for problem in _texts(located)]
    except load.RecipeError as error:
        problems = [_shown(problem) for problem in error.problems]
    except InputError as error:
        problems = [{"file": error.where or name, "line": None, "key": "", "message": error.what}]
    return {"file": name, "valid": not problems, **about, "problems": problems}


def _texts(located: load.Located) -> list[Problem]:
    """What is wrong with the texts that a recipe names."""
    from qtool.calibration import sources
    from qtool.errors import InputError

    recipe, found = located.recipe, []
    for path, data in ((("calibration", "data"), recipe.calibration.data), (("eval", "text"), recipe.eval.text)):
        try:
            sources.check(data)
        except InputError as error:
            found.append(located.problem(path, f"{error.what}: {data}"))
    return [problem for problem in found if problem is not None]


def _shown(problem: Problem) -> dict[str, Any]:
    return {"file": problem.file, "line": problem.line, "key": problem.key, "message": problem.message}
