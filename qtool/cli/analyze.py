"""`qtool analyze`: what quantizing each linear layer costs the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.calibration.sources import BUILTIN
from qtool.cli.bundle import expanded
from qtool.cli.measuring import Measurement, WindowLength
from qtool.cli.options import MODEL, Offline, Printed, TrustRemoteCode, console, find_model

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.tuning.job import LinearBytes, Sensitivities, Sensitivity, SensitivityJob


@dataclass(frozen=True)
class Estimate(Measurement):
    """A measurement that is an estimate: less text does."""

    windows: Annotated[int, typer.Option(min=1, help="The number of windows of text.")] = 4
    length: WindowLength = 256
    samples: Annotated[int, typer.Option(min=1, help="The number of calibration samples.")] = 16


@expanded
def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    measurement: Estimate,
    *,
    top: Annotated[int, typer.Option(min=0, help="The number of rows in the table. 0 shows all.")] = 20,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    printed: Printed,
) -> None:
    """Rank a float model's linear layers by what quantizing each of them alone would cost.

    For each linear layer, the result has the relative error of its output, and the KL divergence of the model's
    next-token distribution if only this layer is quantized. The KL divergence is estimated from the gradients of one
    backward pass. The relative error alone ranks wrongly, because its direction matters too.

    Examples:

      qtool analyze ./SmolLM2-135M

      qtool analyze ./Qwen3-8B --scheme w8a8-dynamic --text texts.jsonl --json > sensitivity.json
    """
    from qtool.tuning.job import run

    with console("starting") as out:
        job = _job(find_model(model, out).path, measurement, trust_remote_code=trust_remote_code)
        out.info(f"recipe {job.recipe.name}, scheme {job.scheme}")
        found = run(job, out.event)
    out.info(f"{found.seconds:.0f} s, peak memory {found.peak_memory_bytes / 1e9:.2f} GB")
    result = _result(job, found)
    if printed.json:
        out.result(result)
    else:
        _show(result, top, out)


def _job(model: Path, measurement: Estimate, *, trust_remote_code: bool) -> SensitivityJob:
    from qtool.tuning.job import SensitivityJob
    from qtool.tuning.wanted import start

    wanted = measurement.wanted()
    begun = start(model, wanted)
    text, calibration = wanted.texts(begun.recipe, for_self=BUILTIN)
    return SensitivityJob(
        model=begun.model,
        recipe=begun.recipe,
        scheme=begun.scheme,
        format=begun.format,
        precisions=begun.precisions,
        text=text,
        calibration=calibration,
        trust_remote_code=trust_remote_code,
    )


def _result(job: SensitivityJob, found: Sensitivities) -> dict[str, Any]:
    """What is printed as JSON: the linears, the costliest first."""
    linears = sorted(found.measured.linears, key=lambda linear: -linear.kl)
    return {
        "model": str(job.model),
        "recipe": job.recipe.name,
        "scheme": job.scheme,
        "text": found.text,
        "calibration": found.calibration,
        "seconds": found.seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "kl_of_all": _least(found),
        "ways": _uniform(found),
        "linears": [_row(linear, found.bytes[linear.linears[0]]) for linear in linears],
    }


def _least(found: Sensitivities) -> float:
    """Of all groups, each in the way that costs least."""
    least: dict[tuple[str, ...], float] = {}
    for group in found.measured.groups:
        key = tuple(group.linears)
        least[key] = min(group.kl, least.get(key, group.kl))
    return sum(least.values())


def _uniform(found: Sensitivities) -> dict[str, dict[str, float]]:
    """Of all groups in one way: KL divergence and bytes of their weights."""
    ways: dict[str, dict[str, float]] = {}
    for group in found.measured.groups:
        sums = ways.setdefault(group.way, {"kl": 0.0, "bytes": 0})
        sums["kl"] += group.kl
        sums["bytes"] += group.bytes
    return ways


def _row(linear: Sensitivity, size: LinearBytes) -> dict[str, Any]:
    return {
        "name": linear.linears[0],
        "way": linear.way,
        **{key: getattr(linear, key) for key in ("activations", "alpha", "relative_error", "kl")},
        "bytes_saved": size.float - linear.bytes,
    }


def _show(result: dict[str, Any], top: int, out: Console) -> None:
    linears = result["linears"]
    shown = linears[:top] if top else linears
    several = len(result["ways"]) > 1
    title = (
        f"{Path(result['model']).name}, {result['scheme']}: KL divergence with one linear quantized "
        f"({result['kl_of_all']:.5f} for all{' at best' if several else ''}, on {result['text']['source']})"
    )
    parents = [each["name"].rpartition(".")[0].replace(".", "/") for each in linears]
    common = os.path.commonpath(parents).replace("/", ".")
    rows = [
        [
            each["name"].removeprefix(f"{common}."),
            each["way"] if several else each["activations"],
            f"{each['relative_error']:.1e}",
            f"{each['kl']:.1e}",
            *([] if several else [f"{each['kl'] / result['kl_of_all']:.1%}"]),
            f"{each['bytes_saved'] / 1e6:.2f}",
        ]
        for each in shown
    ]
    first = f"linear in {common}" if common else "linear"
    columns = [first, "quantized as" if several else "kind", "error", "KL, nats", *([] if several else ["share"])]
    out.table(title, [*columns, "MB saved"], rows, result=True)
    if len(shown) < len(linears):
        out.info(f"{len(linears) - len(shown)} more: --top 0 shows all")
    if several:
        uniform = [[way, f"{sums['kl']:.5f}", f"{sums['bytes'] / 1e6:,.1f}"] for way, sums in result["ways"].items()]
        out.table("All linears in one way", ["quantized as", "KL, nats", "MB"], uniform, result=True)
