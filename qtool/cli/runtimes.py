"""`qtool runtimes`: which runtime reads what, and what can serve a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from qtool.cli.options import Debug, Json, Quiet, console, path_or_stdin


def runtimes(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A model folder, quantized or not, or - to read its path from standard input."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which runtime reads which models, in which format and scheme.

    With MODEL, show what can serve this model: as it is, and in each format and each scheme of its recipe.

    Examples:

      qtool runtimes

      qtool runtimes ./Qwen3-8B

      qtool runtimes ./Qwen3-8B --json | jq '.[] | select(.answer != "no") | .how'
    """
    from qtool.runtimes import table

    out = console()
    as_text = not json
    if model is None:
        known = table.rows()
        if as_text:
            source = table.COLUMNS.index("source")  # too wide for a terminal
            every = [table.COLUMNS, *(row.cells for row in known)]
            columns, *lines = ([*cells[:source], *cells[source + 1 :]] for cells in every)
            out.table("", columns, lines, result=True)
            return
        out.result([asdict(row) for row in known])
        return
    from qtool.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path_or_stdin(model))
    ways = table.ways(checkpoint)
    if as_text:
        out.table(
            str(checkpoint.path),
            ["runtime", "format", "scheme", "reads it", "how, or why not", "checked"],
            [
                (
                    f"{way.runtime} {way.version}",
                    way.format,
                    way.scheme or "as it is",
                    way.answer,
                    "; ".join(filter(None, [way.how, way.why])),
                    way.checked,
                )
                for way in ways
            ],
            result=True,
        )
        return
    out.result([asdict(way) for way in ways])
