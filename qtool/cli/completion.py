"""What a shell completes after an option or in place of an argument."""

from __future__ import annotations

import typer


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes. A shell completes files by itself where none fits."""
    from qtool.recipe import load

    return [name for name in load.names() if name.startswith(incomplete)]


def schemes(context: typer.Context, incomplete: str) -> list[str]:
    """Names of schemes: those of the recipe on the command line, else those of all shipped recipes."""
    from qtool.errors import InputError
    from qtool.recipe import load

    named = context.params.get("recipe")
    try:
        found = [load.load(name) for name in ([named] if named else load.names())]
    except InputError:
        return []
    names = dict.fromkeys(scheme for recipe in found for scheme in recipe.schemes)
    return [name for name in names if name.startswith(incomplete)]
