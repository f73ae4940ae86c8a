"""What somebody asks to measure or tune, and what is chosen where nothing was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtool import runtimes
from qtool.calibration.sources import BUILTIN, SELF, absolute
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.job import CalibrationText
from qtool.errors import InputError
from qtool.evaluation.job import EvaluationText
from qtool.files import expand
from qtool.jobs.quantize import with_scheme
from qtool.recipe.load import load, match, names
from qtool.recipe.schema import Recipe
from qtool.tuning import ways


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How to quantize, and on what to calibrate and to measure; None leaves the choice to the recipe.

    Attributes:
        recipe: a recipe's name or file; None for the one that matches the model.
        scheme: one of the recipe's.
        text: to measure on: builtin, or a file of text.
        windows, length: windows of it, and tokens of each.
        calibration: builtin, or a file of text.
        samples, seq_len: of the calibration.
        runtime: to compare all precisions that it reads; None for what the scheme uses.
    """

    recipe: str | None = None
    scheme: str | None = None
    text: str = BUILTIN
    windows: int
    length: int
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    runtime: str | None = None

    def texts(self, recipe: Recipe, *, for_self: str = SELF) -> tuple[EvaluationText, CalibrationText]:
        """The text to measure on and the one to calibrate on.

        Args:
            for_self: what to calibrate on where the model's own samples are asked for.

        Raises:
            InputError: these are the model's own samples.
        """
        data = self.calibration or recipe.calibration.data
        data = for_self if data == SELF else data
        for option, each in (("--text", self.text), ("--calibration", data)):
            if each == SELF:
                what = "the model's own samples can't be used here"
                raise InputError(what, where=option, hint="use builtin, or a file")
        return EvaluationText(absolute(self.text), self.windows, self.length), CalibrationText(
            absolute(data),
            self.samples or recipe.calibration.samples,
            self.seq_len or recipe.calibration.seq_len,
            recipe.calibration.seed,
        )


@dataclass(frozen=True)
class Start:
    """Where measuring starts from.

    Attributes:
        model: the float checkpoint's folder.
        recipe, scheme: how to quantize.
        extends: how another recipe can name this one: a shipped recipe's name, or a file's whole path.
        format: of the quantized model.
        precisions: to choose from, for the runtime that was named; none without one.
    """

    model: Path
    recipe: Recipe
    scheme: str
    extends: str
    format: str
    precisions: tuple[str, ...]


def start(model: str | Path, wanted: Wanted) -> Start:
    """The model, the recipe and its scheme, the format and the precisions.

    Raises:
        InputError: no such model, recipe or runtime, no recipe that fits, or no such scheme in it.
    """
    folder = expand(model).absolute()
    checkpoint = Checkpoint.open(folder)
    name = wanted.recipe
    recipe = match(checkpoint.config)[0] if name is None else load(name)
    shipped = name is None or name in names()
    extends = recipe.name if shipped else str(expand(str(name)).absolute())
    format, precisions = str(recipe.export.format), tuple[str, ...]()
    if wanted.runtime is not None:
        format, precisions = _for_runtime(wanted.runtime, recipe.export.format, checkpoint)
    return Start(folder, *with_scheme(recipe, wanted.scheme), extends, format, precisions)


def _for_runtime(name: str, format: str, checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    """The recipe's format if the runtime reads it, else the first that it does; and the precisions that it reads."""
    runtime = runtimes.get(name)
    if runtime.reading(format) is None:
        format = next(reads.format for reads in runtime.reads if reads.format != "float")
    return format, ways.precisions(runtime, formats.get(format), checkpoint.config)
