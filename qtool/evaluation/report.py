"""An evaluation as one self-contained page: no scripts, nothing fetched, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from qtool.errors import InputError
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


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, interval) of each figure, as text; a figure without an interval has ''."""
    found = []
    for key, (name, form) in FIGURES.items():
        figure = result[key]
        low, high = figure.get("low"), figure.get("high")
        interval = "" if low is None or high is None else f"{low:{form}} to {high:{form}}"
        found.append((name, f"{figure['value']:{form}}", interval))
    return found


def check(file: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a page that couldn't be made.

    Raises:
        InputError: the file exists (without `overwrite`) or is a folder, its folder doesn't, or matplotlib is missing.
    """
    from importlib.util import find_spec

    check_new_file(file, "--report", overwrite=overwrite)
    if missing := [package for package in ("matplotlib", "jinja2") if find_spec(package) is None]:
        raise InputError(
            f"a report needs the Python package {missing[0]}, which is not installed",
            where="--report",
            hint="pip install matplotlib jinja2",
        )


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Put the page at `file`, whole or not at all.

    Raises:
        QtoolError: the file can't be written.
    """
    write_text(file, page(result))


def page(result: Mapping[str, Any]) -> str:
    """The page for what `qtool eval --json` prints."""
    import jinja2

    from qtool.evaluation import plots

    groups = result["groups"]
    base, quantized = (Path(result[key]).name for key in ("base", "quantized"))
    text = result["text"]
    sizes = {f"{base} (base)" if base == quantized else base: result["sizes"]["base"]}
    sizes[quantized] = result["sizes"]["quantized"]
    along = result["kl_along_text"]
    pictures = [
        (
            "KL divergence along the text",
            f"Means of {along['tokens']} predicted tokens each.",
            plots.along_text(along["values"], along["tokens"], result["kl_divergence"]["value"]),
        )
    ]
    if any(group["relative_error"] is not None for group in groups):
        pictures.append(
            (
                "Error per layer",
                "Squared error of each group's output over its square, on calibration text.",
                plots.errors(groups),
            )
        )
    if any(group["alpha"] is not None for group in groups):
        pictures.append(
            ("Smoothing", "The exponent alpha: 0 leaves it to the weights, 1 to the activations.", plots.alphas(groups))
        )
    if any("input" in group and "smoothed" in group for group in groups):
        pictures.append(
            (
                "Activation ranges",
                "The largest value of each input over that of a typical channel, before and after smoothing.",
                plots.ranges(groups),
            )
        )
    pictures.append(("Size", "Where the bytes are.", plots.sizes(sizes)))
    template = resources.files("qtool.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["range"] = lambda r: f"{r['low']:.4g} to {r['high']:.4g}" if r else ""
    environment.filters["mb"] = lambda n: f"{n / 1e6:,.1f}"
    return environment.from_string(template).render(
        title=f"{quantized} against {base}",
        subtitle=f"{text['windows']} x {text['length']} tokens of {text['source']}",
        runtime=result["runtime"],
        rows=rows(result),
        pictures=pictures,
        groups=groups,
        sizes=sizes,
        along=along,
        version=__version__,
    )
