"""`qtool analyze`: what quantizing each linear layer costs the model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.calibration.sources import BUILTIN, SELF, absolute
from qtool.cli.measuring import CalibrationText, MeasuredText, RecipeScheme, SampleLength, WindowLength
from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin
from qtool.errors import InputError
from qtool.files import expand

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.console import Console
    from qtool.recipe.schema import Recipe
    from qtool.tuning.job import LinearBytes, Sensitivity


def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model's folder; - reads its path from stdin.")],
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or file. Default: the matching one.")] = None,
    scheme: RecipeScheme = None,
    text: MeasuredText = BUILTIN,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 4,
    length: WindowLength = 256,
    calibration: CalibrationText = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 16,
    seq_len: SampleLength = None,
    top: Annotated[int, typer.Option(min=0, help="Rows of the table; 0 shows all.")] = 20,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank a float model's linear layers by what quantizing each of them alone would cost.

    Per linear: the relative error of its output, and the KL divergence of the model's next-token distribution when
    only this one is quantized, estimated from the gradients of one backward pass. The error alone ranks wrongly: what
    counts is which way it points. On a terminal the result is a table, else JSON.

    Examples:

      qtool analyze ./SmolLM2-135M

      qtool analyze ./Qwen3-8B --scheme w8a8-dynamic --text texts.jsonl --json > sensitivity.json
    """
    from qtool.checkpoint.reader import Checkpoint
    from qtool.engines.job import CalibrationText
    from qtool.evaluation.job import EvaluationText
    from qtool.tuning.job import SensitivityJob, run

    folder = expand(path_or_stdin(model)).absolute()
    chosen, scheme, _ = recipe_for(Checkpoint.open(folder), recipe, scheme)
    data = calibration or chosen.calibration.data
    data = BUILTIN if data == SELF else data
    job = SensitivityJob(
        model=folder,
        recipe=chosen,
        scheme=scheme,
        format=chosen.export.format,
        text=EvaluationText(absolute(text), windows, length),
        calibration=CalibrationText(
            absolute(data), samples, seq_len or chosen.calibration.seq_len, chosen.calibration.seed
        ),
        trust_remote_code=trust_remote_code,
    )
    with console() as out:
        out.info(f"recipe {chosen.name}, scheme {scheme}")
        found = run(job, out.event)
    out.info(f"{found.seconds:.0f} s, peak memory {found.peak_memory_bytes / 1e9:.2f} GB")
    result = {
        "model": str(folder),
        "recipe": chosen.name,
        "scheme": scheme,
        "text": found.text,
        "calibration": found.calibration,
        "seconds": found.seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "kl_of_all": sum(group.kl for group in found.measured.groups),
        "linears": [
            _row(linear, found.bytes[linear.linears[0]])
            for linear in sorted(found.measured.linears, key=lambda linear: -linear.kl)
        ],
    }
    if json or not sys.stdout.isatty():
        out.result(result)
    else:
        _show(result, top, out)


def _row(linear: Sensitivity, size: LinearBytes) -> dict[str, Any]:
    return {
        "name": linear.linears[0],
        **{key: getattr(linear, key) for key in ("activations", "alpha", "relative_error", "kl")},
        "bytes_saved": size.float - size.quantized,
    }


def recipe_for(checkpoint: Checkpoint, name: str | None, scheme: str | None) -> tuple[Recipe, str, str]:
    """The recipe, its scheme, and how another recipe can name it in `extends`.

    Raises:
        InputError: no such recipe, none that fits, or no such scheme in it.
    """
    from qtool.recipe.load import load, match, names

    recipe = match(checkpoint.config)[0] if name is None else load(name)
    wanted = scheme or recipe.default_scheme
    if wanted not in recipe.schemes:
        raise InputError(
            f"no scheme {wanted!r} in this recipe",
            where=f"recipe {recipe.name}",
            hint=f"it has {', '.join(recipe.schemes)}",
        )
    shipped = name is None or name in names()
    return recipe, wanted, recipe.name if shipped else str(expand(str(name)).absolute())


def _show(result: dict[str, Any], top: int, out: Console) -> None:
    linears = result["linears"]
    shown = linears[:top] if top else linears
    title = (
        f"{Path(result['model']).name}, {result['scheme']}: KL divergence with one linear quantized "
        f"({result['kl_of_all']:.5f} for all, on {result['text']['source']})"
    )
    parents = [each["name"].rpartition(".")[0].replace(".", "/") for each in linears]
    common = os.path.commonpath(parents).replace("/", ".")
    rows = [
        [
            each["name"].removeprefix(f"{common}."),
            each["activations"],
            f"{each['relative_error']:.1e}",
            f"{each['kl']:.1e}",
            f"{each['kl'] / result['kl_of_all']:.1%}",
            f"{each['bytes_saved'] / 1e6:.2f}",
        ]
        for each in shown
    ]
    first = f"linear in {common}" if common else "linear"
    out.table(title, [first, "kind", "error", "KL, nats", "share", "MB saved"], rows, result=True)
    if len(shown) < len(linears):
        out.info(f"{len(linears) - len(shown)} more: --top 0 shows all")
