"""The options of commands that measure a model: with which recipe, on which text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from qtool.calibration.sources import BUILTIN
from qtool.cli import completion

if TYPE_CHECKING:
    from qtool.tuning.wanted import Wanted

_TEXTS = "FILE|builtin"
_RECIPES = "the recipe's"

MeasuredText = Annotated[
    str,
    typer.Option(
        "--text", metavar=_TEXTS, help="The text to measure on: a .txt, .jsonl or .parquet file, or the built-in text."
    ),
]
WindowLength = Annotated[int, typer.Option(min=2, help="The number of tokens in each window.")]


@dataclass(frozen=True)
class Measurement:
    """What is quantized how, what it is calibrated and what it is measured on. `analyze` measures less than `tune`."""

    panel: ClassVar[str] = "Measurement"

    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="The recipe to start from: its name or file.",
            show_default="the one that fits the model",
            autocompletion=completion.recipes,
        ),
    ] = None
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the recipe's schemes.",
            show_default=_RECIPES,
            autocompletion=completion.schemes,
        ),
    ] = None
    text: MeasuredText = BUILTIN
    windows: Annotated[int, typer.Option(min=1, help="The number of windows of text to evaluate on.")] = 24
    length: WindowLength = 512
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar=_TEXTS,
            help="The calibration text: a .txt, .jsonl or .parquet file, or the built-in text.",
            show_default=_RECIPES,
        ),
    ] = None
    samples: Annotated[
        int | None, typer.Option(min=1, help="The number of calibration samples.", show_default=_RECIPES)
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", min=2, help="The number of tokens in each calibration sample.", show_default=_RECIPES
        ),
    ] = None

    def wanted(self) -> Wanted:
        """The same, as the services take it."""
        from qtool.tuning.wanted import Wanted

        return Wanted(**vars(self))
