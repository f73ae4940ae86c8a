"""The options of commands that measure a model: with which recipe, on which text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.calibration.sources import BUILTIN
from qtool.cli import completion

if TYPE_CHECKING:
    from qtool.tuning.wanted import Wanted

_TEXTS = "FILE|builtin"

MeasuredText = Annotated[
    str, typer.Option("--text", metavar=_TEXTS, help="To measure on: .txt, .jsonl, .parquet or built-in.")
]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens per window.")]


@dataclass(frozen=True)
class Measurement:
    """What is quantized how, what it is calibrated and what it is measured on. `analyze` measures less than `tune`."""

    recipe: Annotated[
        str | None,
        typer.Option(
            help="The recipe to start from. Default: the one that matches the model.", autocompletion=completion.recipes
        ),
    ] = None
    scheme: Annotated[
        str | None,
        typer.Option(help="One of its schemes. Default: the recipe's own.", autocompletion=completion.schemes),
    ] = None
    text: MeasuredText = BUILTIN
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to evaluate on.")] = 24
    length: WindowLength = 512
    calibration: Annotated[
        str | None, typer.Option(metavar=_TEXTS, help="Calibration text. Default: the recipe's.")
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples.")] = None
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per calibration sample.")] = None

    def wanted(self) -> Wanted:
        """The same, as the services take it."""
        from qtool.tuning.wanted import Wanted

        return Wanted(**vars(self))
