"""The options of commands that measure a model: with which recipe, on which text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from qtool.calibration.sources import BUILTIN
from qtool.cli.choices import RECIPES, RecipeName, SampleLength, Samples, SchemeName
from qtool.runtimes.facts import RUNTIMES

if TYPE_CHECKING:
    from qtool.tuning.wanted import Wanted

_TEXTS = "FILE|builtin"
_NAMES = tuple(runtime.name for runtime in RUNTIMES)

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

    recipe: RecipeName = None
    scheme: SchemeName = None
    text: MeasuredText = BUILTIN
    windows: Annotated[int, typer.Option(min=1, help="The number of windows of text to evaluate on.")] = 24
    length: WindowLength = 512
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar=_TEXTS,
            help="The calibration text: a .txt, .jsonl or .parquet file, or the built-in text.",
            show_default=RECIPES,
        ),
    ] = None
    samples: Samples = None
    seq_len: SampleLength = None
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(_NAMES),
            help="Compare all precisions that this runtime reads.",
            show_default="what the scheme uses",
        ),
    ] = None

    def wanted(self) -> Wanted:
        """The same, as the services take it."""
        from qtool.tuning.wanted import Wanted

        return Wanted(**vars(self))
