"""`qtool tune`: a recipe for one model, by what each of its linear layers costs."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from qtool.cli.bundle import expanded
from qtool.cli.measuring import Measurement
from qtool.cli.options import MODEL, Offline, Printed, TrustRemoteCode, console, find_model
from qtool.errors import InputError, QtoolError
from qtool.files import check_new_file, is_dir, real

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.tuning.tune import Tuned, TuningJob

_SHOWN = 10  # groups that changed
_POINTS = 8  # of the frontier


@dataclass(frozen=True)
class Limit:
    """What the model may cost: quality or bytes."""

    panel: ClassVar[str] = "Goal"

    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", min=0, help="Find the smallest model with at most this KL divergence (in nats)."),
    ] = None
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="SIZE",
            help="Find the best model of at most this size, such as 165MB or 102% of the untuned scheme.",
        ),
    ] = None


@dataclass(frozen=True)
class Search:
    """How the recipe is searched for, and what that may do."""

    panel: ClassVar[str] = "Search"

    budget: Annotated[
        int, typer.Option(min=2, help="How often to quantize and evaluate, including the untuned scheme.")
    ] = 3
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder for temporary models.", show_default="the system's temporary folder"
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write a page with size against KL divergence to this file."),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the recipe's file and the report if they exist.")
    ] = False
    offline: Offline = False
    trust_remote_code: TrustRemoteCode = False


@expanded
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    limit: Limit,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The recipe file to write.",
            show_default="standard output",
            rich_help_panel="Goal",
        ),
    ] = None,
    measurement: Measurement,
    search: Search,
    printed: Printed,
) -> None:
    """Make a recipe: which layers stay float, and how each of the others is quantized.

    First, tune estimates what each layer costs, as qtool analyze does, and gives bytes to the layers where they help
    most. Then it quantizes the model with this recipe and evaluates it. With --max-kl it corrects the recipe and does
    this again, up to --budget times in all. With --runtime, it chooses among all precisions that this runtime reads,
    4-bit weights among them. Otherwise it chooses the kind of activations, of those that the scheme uses.

    Examples:

      qtool tune ./SmolLM2-135M --max-size 102% --output smollm2-tuned.yaml

      qtool tune ./SmolLM2-135M --runtime vllm --max-size 80% --output smaller.yaml --report frontier.html

      qtool quantize ./SmolLM2-135M --recipe smollm2-tuned.yaml
    """
    from qtool.evaluation import report as pages
    from qtool.files import write_text
    from qtool.tuning import report
    from qtool.tuning.tune import tune as find

    with console("starting") as out:
        if search.report is not None:
            pages.check(search.report, overwrite=search.overwrite)
        job = _job(find_model(model, out).path, limit, output, measurement, search)
        out.info(f"recipe {job.recipe.name}, scheme {job.scheme}")
        result = find(job, out.event)
        _summary(result, out)
        if output is not None:
            write_text(output, result.recipe)
        if search.report is not None:
            write_text(search.report, report.page(result, job, command=shlex.join(["qtool", *sys.argv[1:]])))
            out.info(f"report: {search.report.absolute()}")
        if printed.json:
            out.result(result.to_json())
        else:
            out.result(result.recipe.rstrip("\n") if output is None else output.absolute())
    if not result.reached:
        raise QtoolError(
            f"a KL divergence of {limit.max_kl:g} was not reached: {result.tuned.kl:.5f}",
            hint="the recipe is the best one found; try a larger --budget, or allow more",
        )


def _job(model: Path, limit: Limit, output: Path | None, measurement: Measurement, search: Search) -> TuningJob:
    """The job. Whatever is wrong shows before hours of measuring."""
    from qtool.tuning.tune import Goal, TuningJob
    from qtool.tuning.wanted import start

    if (limit.max_kl is None) == (limit.max_size is None):
        raise InputError("a limit is missing: for the quality or for the size", hint="--max-kl X, or --max-size SIZE")
    wanted = measurement.wanted()
    begun = start(model, wanted)
    if output is not None:
        _check_output(output, begun.extends, overwrite=search.overwrite)
    scratch = search.scratch
    if scratch is not None and not (is_dir(scratch) and os.access(scratch, os.W_OK)):
        raise InputError("is not a folder that can be written to", where=str(scratch), hint="Choose another --scratch.")
    text, calibration = wanted.texts(begun.recipe)
    return TuningJob(
        model=begun.model,
        recipe=begun.recipe,
        scheme=begun.scheme,
        extends=begun.extends,
        format=begun.format,
        precisions=begun.precisions,
        goal=Goal(limit.max_kl, limit.max_size),
        text=text,
        calibration=calibration,
        budget=search.budget,
        scratch=scratch,
        trust_remote_code=search.trust_remote_code,
    )


def _check_output(output: Path, extends: str, *, overwrite: bool) -> None:
    """Before hours of measuring: the recipe can be written, and not over one that it builds on."""
    from qtool.recipe.load import files

    check_new_file(output, "--output", overwrite=overwrite)
    if real(output) in files(extends):
        what = "the new recipe builds on this one and can't replace it"
        raise InputError(what, where=str(output), hint="Choose another --output.")


def _summary(result: Tuned, out: Console) -> None:
    from qtool.tuning.search import thinned

    rows = []
    for name, each in (("reference", result.reference), ("tuned", result.tuned)):
        kl = each.quality.kl_divergence
        interval = "" if kl["low"] is None else f"{kl['low']:.5f} to {kl['high']:.5f}"
        rows.append([name, f"{kl['value']:.5f}", interval, f"{each.bytes / 1e6:,.1f} MB"])
    title = f"{result.evaluations} evaluations, {len(result.changed)} groups of linears changed"
    out.table(title, ["", "KL divergence", "95 % interval", "size"], rows)
    if (points := thinned(result.frontier, _POINTS))[1:]:
        rows = [[f"{point.bytes / 1e6:,.1f} MB", f"{point.kl:.5f}"] for point in points]
        out.table("What more bytes would give, as estimated", ["size", "KL divergence"], rows)
    changes = sorted(result.changed, key=lambda change: -change.kl)
    shown = [[", ".join(change.linears), change.before, change.after] for change in changes[:_SHOWN]]
    if shown:
        out.table("Changed, the costliest first", ["linears", "from", "to"], shown)
    if len(changes) > _SHOWN:
        out.info(f"{len(changes) - _SHOWN} more: the recipe and --json have all of them")
