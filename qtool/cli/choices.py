"""Options of every command that quantizes, or measures what quantizing does: which recipe, on which samples."""

from __future__ import annotations

from typing import Annotated

import typer

from qtool.cli import completion

RECIPES = "the recipe's"
"""The default of an option where the recipe has a value."""

RecipeName = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="A recipe's name or file.",
        show_default="the one that fits the model",
        autocompletion=completion.recipes,
    ),
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="One of the recipe's schemes, such as w8a8-dynamic.",
        show_default=RECIPES,
        autocompletion=completion.schemes,
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, help="The number of calibration samples.", show_default=RECIPES)]
SampleLength = Annotated[
    int | None,
    typer.Option("--seq-len", min=2, help="The number of tokens in each calibration sample.", show_default=RECIPES),
]
