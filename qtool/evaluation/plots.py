"""The report's plots, drawn by matplotlib as SVG: narrow enough for a phone, with text that stays text."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.9  # inches at 72 points: a point is about a pixel on a phone
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qtool",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_MOST_KINDS = 6

Groups = Sequence[Mapping[str, Any]]


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


def along_text(values: Sequence[float], tokens: int, mean: float) -> str:
    """KL divergence by place in the text."""

    def draw(axes: Axes) -> None:
        places = [i * tokens for i in range(len(values) + 1)]
        axes.stairs(values, places, fill=True, color="#3b6fb6", alpha=0.8)
        axes.axhline(mean, color="#c0392b", linewidth=1, label=f"mean {mean:.5f}")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), borderpad=0)
        axes.set_xlabel("predicted tokens")
        axes.set_ylabel("KL, nats per token")

    return _svg([draw], 2.4)


def errors(groups: Groups) -> str:
    """Relative output error of each group, by layer."""

    def draw(axes: Axes) -> None:
        for name, rows in _kinds([group for group in groups if group["relative_error"] is not None]).items():
            axes.plot([number(r) for r in rows], [r["relative_error"] for r in rows], ".-", label=name, linewidth=1)
        _log(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _svg([draw], 3.2)


def alphas(groups: Groups) -> str:
    """The smoothing's exponent of each group, by layer."""

    def draw(axes: Axes) -> None:
        for i, (marker, (name, rows)) in enumerate(zip("os^vDP", _kinds(groups).items(), strict=False)):
            # side by side, since many are equal
            known = [(number(row) + 0.2 * i, row["alpha"]) for row in rows if row.get("alpha") is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker, label=name, markersize=3)
        axes.set_ylim(-0.05, 1.05)
        axes.set_xlabel("layer")
        axes.set_ylabel("alpha")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _svg([draw], 2.8)


def ranges(groups: Groups) -> str:
    """How far each input's largest value stands out of a typical channel's, before and after smoothing."""

    def panel(name: str, rows: Groups) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            layers = [number(row) for row in rows]
            axes.plot(layers, [outlier(row["input"]) for row in rows], ".-", color="#b0b0b0", label="before")
            axes.plot(layers, [outlier(row["smoothed"]) for row in rows], ".-", color="#3b6fb6", label="after")
            _log(axes)
            axes.set_title(name, loc="left", fontsize=10)
            axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.97), borderpad=0)

        return draw

    kinds = _kinds([group for group in groups if "input" in group and "smoothed" in group])
    return _svg([panel(name, rows) for name, rows in kinds.items()], 1.6)


def outlier(range_: Mapping[str, float]) -> float:
    """The largest magnitude over the typical channel's."""
    return max(abs(range_["low"]), abs(range_["high"])) / max(range_["typical"], 1e-12)


def sizes(by_model: Mapping[str, Mapping[str, int]]) -> str:
    """Where the bytes are, in each model."""

    def draw(axes: Axes) -> None:
        names = list(by_model)[::-1]
        left = [0.0] * len(names)
        for part, color in zip(
            next(iter(by_model.values())), ("#8d99ae", "#e0a458", "#3b6fb6", "#555b6e"), strict=True
        ):
            widths = [by_model[name][part] / 1e6 for name in names]
            axes.barh(names, widths, left=left, label=part, color=color)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_xlabel("MB")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axes.grid(visible=False, axis="y")

    return _svg([draw], 2.2)


def _log(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _kinds(groups: Groups) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for group in groups:
        found.setdefault(kind(group), []).append(group)
    most = sorted(found, key=lambda name: -len(found[name]))[:_MOST_KINDS]
    return {name: rows for name, rows in found.items() if name in most}


def _svg(panels: Sequence[Callable[[Axes], None]], height: float) -> str:
    """A data URI: as an image of its own, a plot's ids and styles stay out of the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure: Figure = Figure(figsize=(_WIDTH, height * len(panels)))
        FigureCanvasSVG(figure)
        for axes, draw in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
