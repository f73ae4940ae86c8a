"""The options of commands that measure a model: with which recipe, on which text."""

from __future__ import annotations

from typing import Annotated

import typer

_TEXTS = "FILE|builtin"

RecipeScheme = Annotated[str | None, typer.Option(help="One of its schemes. Default: the recipe's own.")]
MeasuredText = Annotated[
    str, typer.Option("--text", metavar=_TEXTS, help="To measure on: .txt, .jsonl, .parquet or built-in.")
]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
CalibrationText = Annotated[str | None, typer.Option(metavar=_TEXTS, help="Calibration text. Default: the recipe's.")]
SampleLength = Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per calibration sample.")]
