"""An evaluation as one self-contained page: no scripts, nothing fetched, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qtool import sizes
from qtool.errors import InputError
from qtool.evaluation import plots, verdict
from qtool.evaluation.plots import Plot
from qtool.evaluation.verdict import Result
from qtool.files import check_new_file, write_text
from qtool.version import __version__

# key of the result: (what it is called, how it is written)
FIGURES = {
    "base_perplexity": ("perplexity, base", ".3f"),
    "quantized_perplexity": ("perplexity, quantized", ".3f"),
    "perplexity_ratio": ("perplexity, quantized / base", ".4f"),
    "kl_divergence": ("KL divergence per token, mean (nats)", ".5f"),
    "kl_median": ("KL divergence, median", ".5f"),
    "kl_p99": ("KL divergence, 99th percentile", ".5f"),
    "kl_max": ("KL divergence, maximum", ".5f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
    "top5_agreement": ("top-5 agreement", ".2%"),
}


def rows(result: Result) -> list[tuple[str, str, str]]:
    """(name, value, interval) of each figure, as text; a figure without an interval has ''."""
    found = []
    for key, (name, form) in FIGURES.items():
        figure = result[key]
        low, high = figure.get("low"), figure.get("high")
        interval = "" if low is None or high is None else f"{low:{form}} to {high:{form}}"
        found.append((name, f"{figure['value']:{form}}", interval))
    return found


def overview(results: Sequence[Result]) -> list[list[str]]:
    """Several models in a table: the heads of the columns, then a row for each model."""
    found = [["model", "size", "KL divergence", "95 % interval", "perplexity ratio", "top-1"]]
    for name, result in zip(verdict.names(results), results, strict=True):
        texts = {key: (value, interval) for key, (_, value, interval) in zip(FIGURES, rows(result), strict=True)}
        size = sizes.show(verdict.nbytes(result))
        found.append([name, size, *texts["kl_divergence"], texts["perplexity_ratio"][0], texts["top1_agreement"][0]])
    return found


def check(file: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a page that couldn't be made.

    Raises:
        InputError: the file exists (without `overwrite`) or is a folder, its folder doesn't, or matplotlib is missing.
    """
    from importlib.util import find_spec

    from qtool.environments.lookup import extra_command

    check_new_file(file, "--report", overwrite=overwrite)
    if missing := [package for package in ("matplotlib", "jinja2") if find_spec(package) is None]:
        raise InputError(
            f"a report needs the Python package {missing[0]}, which is not installed",
            where="--report",
            hint=f"Install it: {extra_command('report')}",
        )


def write(file: Path, results: Sequence[Result], *, command: str) -> None:
    """Put the page at `file`, whole or not at all.

    Args:
        results: what `qtool eval --json` prints of each model; all of one run.
        command: how it was called.

    Raises:
        QtoolError: the file can't be written.
    """
    write_text(file, page(results, command=command))


def style() -> str:
    """What all pages look like: CSS."""
    return resources.files("qtool.evaluation").joinpath("page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Picture:
    """A plot, and what it shows."""

    heading: str
    explanation: str
    plot: Plot


def page(results: Sequence[Result], *, command: str) -> str:
    """The page's text. Arguments as for `write`."""
    import jinja2

    first, called = results[0], verdict.names(results)
    base, text = Path(first["base"]).name, first["text"]
    by_model = [
        (base, first["sizes"]["base"]),
        *((n, r["sizes"]["quantized"]) for n, r in zip(called, results, strict=True)),
    ]
    template = resources.files("qtool.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["range"] = lambda r: f"{r['low']:.4g} to {r['high']:.4g}" if r else ""
    environment.filters["mb"] = lambda n: f"{n / 1e6:,.1f}"
    environment.filters["size"] = sizes.show
    return environment.from_string(template).render(
        style=style(),
        title=f"{called[0] if len(called) == 1 else f'{len(called)} models'} against {base}",
        verdict=verdict.of_all(results),
        overview=overview(results),
        pictures=_of_all(results, called),
        models=[_model(i, name, result) for i, (name, result) in enumerate(zip(called, results, strict=True))],
        sizes=by_model,
        parts=[(part, f"--c{i}") for i, part in enumerate(by_model[0][1])],
        largest=max(sum(of.values()) for _, of in by_model),
        command=command,
        date=first["date"].replace("T", " ").replace("+00:00", " UTC"),
        text=text,
        windows=text["windows"],
        length=text["length"],
        runtime=first["runtime"],
        versions=", ".join(
            f"{name} {version}" for name, version in {"qtool": __version__, **first["versions"]}.items()
        ),
        took=f"{first['seconds']:.0f} s, {sizes.show(first['peak_memory_bytes'])} of memory at most",
        made=[(name, _made(result["made"])) for name, result in zip(called, results, strict=True)],
        version=__version__,
    )


def _of_all(results: Sequence[Result], called: Sequence[str]) -> list[Picture]:
    if len(results) == 1:
        return []
    models = [(n, verdict.nbytes(r), r["kl_divergence"]) for n, r in zip(called, results, strict=True)]
    return [
        Picture(
            "Size and KL divergence",
            "Lower is nearer to the original, and left is smaller. Lines are 95 % confidence intervals. "
            "Models that would cover each other stand side by side.",
            plots.size_and_kl(models),
        )
    ]


def _model(index: int, name: str, result: Result) -> dict[str, Any]:
    """What the page says of one model."""
    return {
        "id": "" if index == 0 else f"m{index + 1}-",
        "name": name,
        "verdict": verdict.of_one(result, name),
        "rows": rows(result),
        "along": result["kl_along_text"],
        "groups": result["groups"],
        "pictures": _pictures(result),
    }


def _pictures(result: Result) -> list[Picture]:
    groups, along = result["groups"], result["kl_along_text"]
    each = f"Each step is the mean of {along['tokens']} predicted tokens." if along["tokens"] > 1 else "Of every token."
    found = [
        Picture(
            "KL divergence along the text",
            each,
            plots.along_text(along["values"], along["tokens"], result["kl_divergence"]["value"]),
        )
    ]
    if any(group["relative_error"] is not None for group in groups):
        explanation = "Squared error of each group's output over its square, on calibration text."
        found.append(Picture("Error per layer", explanation, plots.errors(groups)))
    if any(group["alpha"] is not None for group in groups):
        explanation = "The exponent alpha of each layer: 0 leaves it to the weights, 1 to the activations."
        found.append(Picture("Smoothing", explanation, plots.alphas(groups)))
    if any("input" in group and "smoothed" in group for group in groups):
        explanation = "The largest value of each input over that of a typical channel, by layer."
        found.append(Picture("Activation ranges", explanation, plots.ranges(groups)))
    return found


def _made(made: Mapping[str, Any]) -> str:
    """How a model was quantized, as far as it says."""
    if made["recipe"] is None:
        return f"{made['format']}; it does not say how it was made"
    return f"{made['recipe']}, scheme {made['scheme']}, {made['format']}; by {made['engine']} of qtool {made['qtool']}"
