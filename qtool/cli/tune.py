"""`qtool tune`: a recipe for one model, by what each of its linear layers costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.calibration.sources import BUILTIN, SELF, absolute
from qtool.cli.measuring import CalibrationText, MeasuredText, RecipeScheme, SampleLength, WindowLength
from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin
from qtool.errors import InputError, QtoolError
from qtool.files import check_new_file, expand, is_dir

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.tuning.tune import Tuned


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model's folder; - reads its path from stdin.")],
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", min=0, help="As small as can be with at most this KL divergence (nats).")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="As good as can be in 165MB, or 102% of the untuned scheme."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The recipe's file. Default: stdout.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The recipe to start from. Default: the one that matches the model.")
    ] = None,
    scheme: RecipeScheme = None,
    text: MeasuredText = BUILTIN,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to evaluate on.")] = 24,
    length: WindowLength = 512,
    calibration: CalibrationText = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples.")] = None,
    seq_len: SampleLength = None,
    budget: Annotated[int, typer.Option(min=2, help="How often to quantize and evaluate, the untuned scheme too.")] = 3,
    scratch: Annotated[
        Path | None, typer.Option(help="Where quantized models lie meanwhile. Default: the system's temporary folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe's file if it exists.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a recipe: which layers stay float, which quantize per token and which per tensor.

    What each layer costs is estimated for all of them at once (see qtool analyze); bytes go where they help most. Then
    the model is quantized by the recipe and evaluated, and with --max-kl corrected, --budget times in all.

    Examples:

      qtool tune ./SmolLM2-135M --max-size 102% --output smollm2-tuned.yaml

      qtool quantize ./SmolLM2-135M --recipe smollm2-tuned.yaml
    """
    from qtool.checkpoint.reader import Checkpoint
    from qtool.cli.analyze import recipe_for
    from qtool.engines.job import CalibrationText
    from qtool.evaluation.job import EvaluationText
    from qtool.files import write_text
    from qtool.tuning.tune import Goal, TuningJob
    from qtool.tuning.tune import tune as find

    if (max_kl is None) == (max_size is None):
        raise InputError(
            "say either how much quality may go, or how large the model may be", hint="--max-kl X, or --max-size SIZE"
        )
    folder = expand(path_or_stdin(model)).absolute()
    checkpoint = Checkpoint.open(folder)
    chosen, scheme, extends = recipe_for(checkpoint, recipe, scheme)
    if output is not None:
        _check_output(output, extends, overwrite=overwrite)
    if scratch is not None and not (is_dir(scratch) and os.access(scratch, os.W_OK)):
        raise InputError("is no folder that can be written to", where=str(scratch), hint="Choose another --scratch.")
    wanted = CalibrationText(
        _text(calibration or chosen.calibration.data, "--calibration"),
        samples or chosen.calibration.samples,
        seq_len or chosen.calibration.seq_len,
        chosen.calibration.seed,
    )
    with console() as out:
        out.info(f"recipe {chosen.name}, scheme {scheme}")
        job = TuningJob(
            model=folder,
            recipe=chosen,
            scheme=scheme,
            extends=extends,
            format=chosen.export.format,
            goal=Goal(max_kl, max_size),
            text=EvaluationText(_text(text, "--text"), windows, length),
            calibration=wanted,
            budget=budget,
            scratch=scratch,
            trust_remote_code=trust_remote_code,
        )
        result = find(job, out.event)
        _summary(result, out)
        if output is not None:
            write_text(output, result.recipe)
        if json:
            out.result(result.to_json())
        else:
            out.result(result.recipe.rstrip("\n") if output is None else output.absolute())
    if not result.reached:
        raise QtoolError(
            f"a KL divergence of {max_kl:g} was not reached: {result.tuned.kl:.5f}",
            hint="the recipe is the best one measured; a larger --budget corrects it further, or allow more",
        )


def _check_output(output: Path, extends: str, *, overwrite: bool) -> None:
    """Before hours of measuring: the recipe can be written, and not over one that it builds on."""
    from qtool.recipe.load import files

    check_new_file(output, "--output", overwrite=overwrite)
    if output.resolve() in files(extends):
        what = "the new recipe builds on this one and can't replace it"
        raise InputError(what, where=str(output), hint="Choose another --output.")


def _text(value: str, option: str) -> str:
    if value == SELF:
        raise InputError("the model's own samples can't be used here", where=option, hint="use builtin, or a file")
    return absolute(value)


def _summary(result: Tuned, out: Console) -> None:
    rows = []
    for name, each in (("reference", result.reference), ("tuned", result.tuned)):
        kl = each.quality.kl_divergence
        interval = "" if kl["low"] is None else f"{kl['low']:.5f} to {kl['high']:.5f}"
        rows.append([name, f"{kl['value']:.5f}", interval, f"{each.bytes / 1e6:,.1f} MB"])
    title = f"{result.evaluations} evaluations, {len(result.changed)} groups of linears changed"
    out.table(title, ["", "KL divergence", "95 % interval", "size"], rows)
