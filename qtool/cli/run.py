"""`qtool run`: a whole recipe, from the hub to generated text, as one job that can be resumed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtool.checkpoint.snapshot import title
from qtool.cli import completion
from qtool.cli.options import (
    MODEL,
    Debug,
    Json,
    Offline,
    Quiet,
    TrustRemoteCode,
    console,
    find_model,
    path_or_stdin,
    resumable,
)
from qtool.errors import InputError
from qtool.files import exists, expand, is_dir, real
from qtool.runtimes.facts import NAMES

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.recipe.schema import Recipe

_SHOWN = 3  # answers


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name or file.", autocompletion=completion.recipes)
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=MODEL,
            show_default="the recipe's model",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", "-w", metavar="DIR", help="The folder for all results.", show_default="MODEL-RECIPE, here"
        ),
    ] = None,
    engine: Annotated[
        Literal["auto", "native", "golden-stick"], typer.Option(help="The engine that quantizes.")
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda", "npu"], typer.Option(help="The kind of device to compute on.")
    ] = "auto",
    runtime: Annotated[str, typer.Option(metavar="|".join(NAMES), help="The runtime that generates.")] = "auto",
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Download, quantize, evaluate, convert and generate as a recipe says, and print the folder with the results.

    After an interruption, or with a changed recipe, run the same command again. It keeps every stage whose inputs and
    outputs are unchanged (it compares SHA-256 hashes of all bytes) and does the rest. The results are in summary.md.
    The folder belongs to the job: files in it are replaced when a stage has to run again.

    These keys of the recipe are for this command: `model` (hub and repo), `export.also` (more formats), `eval` (text,
    windows, length) and `generate.prompts`.

    Examples:

      qtool run mine.yaml

      qtool run smollm2 ./SmolLM2-135M-Instruct --work ./job --json
    """
    from qtool.files import write_text
    from qtool.jobs import recipe as service
    from qtool.jobs import stages, summary
    from qtool.recipe.load import load

    source = None if model is None else path_or_stdin(model)
    with console("starting") as out:
        chosen = load(recipe)
        given = None if source is None else _given(source, out)
        folder = expand(work or Path(_default(chosen, given))).absolute()
        _check(chosen, given, folder)
        settings = service.Settings(engine, device, runtime, trust_remote_code)
        resumable(by=None)
        with stages.opened(
            folder, out.info, lambda stage, done, total: out.progress(stage, done, total, "bytes")
        ) as job:
            outcome = service.run(job, chosen, given, settings, out.event)
            found = summary.collect(chosen, folder, outcome)
            write_text(folder / summary.PAGE, summary.page(found))
        _show(out, found, folder / summary.PAGE)


def _given(source: str, out: Console) -> Path:
    """A folder, or a GGUF file, which the job converts in its own folder."""
    path = expand(source)
    return path if exists(path) or path.suffix == ".gguf" else find_model(source, out).path


def _default(recipe: Recipe, given: Path | None) -> str:
    if given is None:
        model = recipe.model.repo.rpartition("/")[2] if recipe.model else "model"
    else:
        model = title(given).removesuffix(".gguf")
    return f"{model}-{recipe.name}"


def _check(recipe: Recipe, given: Path | None, folder: Path) -> None:
    """Refuse what could only fail, before anything is made."""
    if given is None and recipe.model is None:
        hint = "Give a model folder after the recipe, or a recipe with `model: {hub: ..., repo: ORG/NAME}`."
        raise InputError("this recipe names no model", where=f"recipe {recipe.name}", hint=hint)
    if given is not None and not exists(given):
        raise InputError("no such file or folder", where=str(given), hint="Check the path.")
    if given is not None and is_dir(given) and real(folder).is_relative_to(real(given)):
        raise InputError("lies in the model's folder", where=str(folder), hint="Choose another --work.")
    if given is not None:
        from qtool.jobs import recipe as service

        service.check(given)


def _show(out: Console, found: dict[str, Any], page: Path) -> None:
    from qtool.jobs import summary

    if out.json:
        out.result(found)
    elif not sys.stdout.isatty():
        out.result(found["work"])
    else:
        out.table("Stages", ["stage", "", "seconds", "output"], summary.stage_rows(found), result=True)
        out.table("Size", ["format", "size", "of the original", "folder"], summary.size_rows(found), result=True)
        if rows := summary.figure_rows(found):
            out.table("What quantization cost", ["", "mean", "95 % interval"], rows, result=True)
        for answer in (found["answers"] or [])[:_SHOWN]:
            out.info(f"\n{summary.answer_text(answer)}")
        out.info(f"\nall of it, as a page: {page}")
        out.result(found["work"])
