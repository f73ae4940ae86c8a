"""A search for a recipe as one self-contained page: size against KL divergence, as a table and a plot."""

from __future__ import annotations

from collections import Counter
from importlib import resources

from qtool import sizes
from qtool.evaluation import plots
from qtool.evaluation.report import style
from qtool.tuning.search import thinned
from qtool.tuning.tune import Tuned, TuningJob
from qtool.version import __version__

_ROWS = 16


def page(result: Tuned, job: TuningJob, *, command: str) -> str:
    """The page's text.

    Args:
        job: what was asked for.
        command: how it was called.
    """
    import jinja2

    template = resources.files("qtool.tuning").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    measured = [("the scheme as it is", result.reference), ("tuned", result.tuned)]
    text = result.sensitivity.text
    return environment.from_string(template).render(
        style=style(),
        title=f"{job.model.name}: what each size costs",
        verdict=[
            f"{name[0].upper()}{name[1:]}: {sizes.show(each.bytes)}, KL divergence {each.kl:.5f} "
            f"({each.predicted_kl:.5f} was estimated)."
            for name, each in measured
        ],
        plot=plots.frontier(
            [(point.bytes, point.kl) for point in result.frontier],
            [(name, each.bytes, each.kl) for name, each in measured],
        ),
        frontier=[(sizes.show(point.bytes), f"{point.kl:.5f}") for point in thinned(result.frontier, _ROWS)],
        ways=Counter(result.ways).most_common(),
        command=command,
        recipe=f"{job.recipe.name}, scheme {job.scheme}, as {job.format}",
        text=f"{job.text.data}, {job.text.windows} windows of {job.text.length} tokens; the line: {text['windows']} of "
        f"{text['length']}",
        version=__version__,
    )
