"""The report's plots, drawn by matplotlib as SVG that stands in the page itself.

Text stays text, in the page's font. Colours are the page's variables, so that they follow a dark mode. Legends are the
page's, too, since HTML wraps where a picture would be cut off. A point is about a pixel on a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.9  # inches at 72 points

# What stands for a colour of the page: the variables --ink, --faint and --c0 to --c5.
INK, FAINT = "#010101", "#010102"
SERIES = tuple(f"#0101{i:02x}" for i in range(16, 22))
_VARIABLES = {INK: "--ink", FAINT: "--faint", **{color: f"--c{i}" for i, color in enumerate(SERIES)}}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qtool",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "figure.constrained_layout.use": True,
}
_MOST_DOTS = 40  # on a line, beyond which they only hide it

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A picture as an SVG element.

    Attributes:
        legend: (text, name of the colour's variable).
    """

    svg: str
    legend: tuple[tuple[str, str], ...] = ()


def kind(group: Mapping[str, Any]) -> str:
    """What a group is in every layer: the names of its linears without their parents, such as "q, k, v_proj"."""
    names = [name.rpartition(".")[2] for name in group["linears"]]
    if len(names) > 1 and all(name.endswith("_proj") for name in names):
        return ", ".join(name.removesuffix("_proj") for name in names) + "_proj"
    return ", ".join(names)


def number(group: Mapping[str, Any]) -> int:
    """The number of a group's layer."""
    found = re.search(r"\.(\d+)(?:\.|$)", "." + str(group["layer"]))
    return int(found[1]) if found else 0


def size_and_kl(models: Sequence[tuple[str, int, Mapping[str, Any]]]) -> Plot:
    """KL divergence by size, a number for each model. The axis is logarithmic where one is ten times another.

    Args:
        models: name, bytes, and KL divergence as an `Estimate`.
    """
    places = [(nbytes / 1e6, kl["value"]) for _, nbytes, kl in models]
    least, most = min(y for _, y in places), max(y for _, y in places)
    logarithmic = 0 < 10 * least < most
    seen = [(x, math.log(y / (least / 2)) if logarithmic else y) for x, y in places]

    aside = _aside(seen)

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator
        from matplotlib.transforms import ScaledTranslation

        figure = axes.get_figure(root=True)
        assert figure is not None
        for i, ((_, _, kl), (x, y), points) in enumerate(zip(models, places, aside, strict=True)):
            color, moved = SERIES[i % 6], axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
            if kl["low"] is not None:
                low = max(least / 2 if logarithmic else 0.0, kl["low"])
                axes.plot([x, x], [low, kl["high"]], color=color, linewidth=2, alpha=0.5, transform=moved)
            axes.plot([x], [y], "o", color=color, markersize=15, alpha=0.25, transform=moved)
            place: Any = {"ha": "center", "va": "center_baseline", "transform": moved}
            axes.text(x, y, str(i + 1), color=color, fontsize=11, fontweight="bold", **place)
        left, right = min(x for x, _ in places), max(x for x, _ in places)
        spread = right - left or 0.1 * right
        axes.set_xlim(left - 0.15 * spread, right + (0.15 + max(aside) / 250) * spread)
        if logarithmic:
            axes.set_ylim(least / 2, most * 2)
            _log(axes)
        else:
            highest = max(most, *(kl["high"] or 0.0 for _, _, kl in models))
            axes.set_ylim(0, 1.15 * highest or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("size, MB")
        axes.set_ylabel("KL, nats per token")

    legend = tuple((f"{i + 1}  {name}", f"--c{i % 6}") for i, (name, _, _) in enumerate(models))
    return Plot(_svg([draw], 3.0), legend)


def frontier(estimated: Sequence[tuple[int, float]], measured: Sequence[tuple[str, int, float]]) -> Plot:
    """KL divergence by size: a line of what is estimated, and a number for each model that was measured.

    Args:
        estimated: (bytes, KL divergence), by bytes.
        measured: (name, bytes, KL divergence).
    """
    line = [(nbytes / 1e6, kl) for nbytes, kl in estimated if kl > 0]

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.plot([x for x, _ in line], [y for _, y in line], "-", color=SERIES[0], linewidth=1.5)
        for i, (_, nbytes, kl) in enumerate(measured):
            axes.plot([nbytes / 1e6], [kl], "o", color=SERIES[i + 1], markersize=15, alpha=0.25)
            place: Any = {"ha": "center", "va": "center_baseline"}
            axes.text(nbytes / 1e6, kl, str(i + 1), color=SERIES[i + 1], fontsize=11, fontweight="bold", **place)
        if line or any(kl > 0 for *_, kl in measured):
            _log(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("size, MB")
        axes.set_ylabel("KL, nats per token")

    legend = (("estimated", "--c0"), *((f"{i + 1}  {name}", f"--c{i + 1}") for i, (name, *_) in enumerate(measured)))
    return Plot(_svg([draw], 3.0), legend)


def _aside(places: Sequence[tuple[float, float]]) -> list[int]:
    """How many points each model moves to the right so that none lies on another."""
    width = max(x for x, _ in places) - min(x for x, _ in places) or 1.0
    height = max(y for _, y in places) or 1.0
    moved: list[int] = []
    for i, (x, y) in enumerate(places):
        near = [j for j in range(i) if abs(places[j][0] - x) < 0.08 * width and abs(places[j][1] - y) < 0.12 * height]
        moved.append(max((moved[j] + 18 for j in near), default=0))
    return moved


def along_text(values: Sequence[float], tokens: int, mean: float) -> Plot:
    """KL divergence by place in the text."""

    def draw(axes: Axes) -> None:
        places = [i * tokens for i in range(len(values) + 1)]
        axes.stairs(values, places, fill=True, color=SERIES[0], alpha=0.7)
        axes.axhline(mean, color=SERIES[1], linewidth=1.5)
        axes.margins(x=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("predicted tokens")
        axes.set_ylabel("KL, nats per token")

    return Plot(_svg([draw], 2.4), ((f"mean {mean:.5f}", "--c1"),))


def errors(groups: Groups) -> Plot:
    """Relative output error of each group, by layer."""
    kinds = _kinds([group for group in groups if group["relative_error"] is not None])

    def draw(axes: Axes) -> None:
        for color, rows in zip(SERIES, kinds.values(), strict=False):
            _line(axes, rows, [row["relative_error"] for row in rows], color)
        _log(axes)
        _layers(axes)
        axes.set_ylabel("relative error")

    return Plot(_svg([draw], 3.0), tuple((name, f"--c{i}") for i, name in enumerate(kinds)))


def alphas(groups: Groups) -> Plot:
    """The smoothing's exponent, by layer: a panel for each kind of group, since many are equal."""

    def panel(name: str, rows: Groups) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _line(axes, rows, [row["alpha"] for row in rows], SERIES[0])
            axes.set_ylim(-0.1, 1.1)
            axes.set_yticks([0, 0.5, 1])
            axes.set_title(name, loc="left", fontsize=10)

        return draw

    kinds = _kinds([group for group in groups if group.get("alpha") is not None])
    return Plot(_svg([panel(name, rows) for name, rows in kinds.items()], 1.05))


def ranges(groups: Groups) -> Plot:
    """How far each input's largest value stands out of a typical channel's, before and after smoothing."""

    def panel(name: str, rows: Groups) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _line(axes, rows, [outlier(row["input"]) for row in rows], SERIES[1])
            _line(axes, rows, [outlier(row["smoothed"]) for row in rows], SERIES[0])
            _log(axes)
            axes.set_title(name, loc="left", fontsize=10)

        return draw

    kinds = _kinds([group for group in groups if "input" in group and "smoothed" in group])
    legend = (("before smoothing", "--c1"), ("after smoothing", "--c0"))
    return Plot(_svg([panel(name, rows) for name, rows in kinds.items()], 1.4), legend)


def outlier(range_: Mapping[str, float]) -> float:
    """The largest magnitude over the typical channel's."""
    return max(abs(range_["low"]), abs(range_["high"])) / max(range_["typical"], 1e-12)


def _line(axes: Axes, rows: Groups, values: Sequence[float], color: str) -> None:
    style = "o-" if len(rows) <= _MOST_DOTS else "-"
    axes.plot([number(row) for row in rows], values, style, color=color, markersize=3, linewidth=1.2)


def _layers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")


def _log(axes: Axes) -> None:
    """A logarithmic axis with two to six labels."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _kinds(groups: Groups) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for group in groups:
        found.setdefault(kind(group), []).append(group)
    most = sorted(found, key=lambda name: -len(found[name]))[: len(SERIES)]
    return {name: rows for name, rows in found.items() if name in most}


def _svg(panels: Sequence[Callable[[Axes], None]], height: float) -> str:
    """The element, without what belongs to a file of its own."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure: Figure = Figure(figsize=(_WIDTH, height * len(panels) + (0.3 if len(panels) > 1 else 0)))
        FigureCanvasSVG(figure)
        all_axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
        for axes, draw in zip(all_axes, panels, strict=True):
            draw(axes)
        if len(panels) > 1:
            _layers(all_axes[-1])
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r" *<(metadata|style)\b.*?</\1>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(r"font-family: [^;\"]*;? *", "", text)
    text = re.sub(r"font: ((?:bold |700 )?)(\d+(?:\.\d+)?px)[^;\"]*", _font, text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def _font(found: re.Match[str]) -> str:
    """The size and weight of a text; the family is the page's."""
    return f"font-size: {found[2]}{'; font-weight: bold' if found[1] else ''}"
