"""`qtool inspect`: what is this checkpoint?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool import sizes
from qtool.cli.options import MODEL, Debug, Json, Offline, Quiet, console, find_model

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint


def inspect(
    path: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor, with the range of its numbers.")
    ] = False,
    filter: Annotated[
        str | None, typer.Option(metavar="REGEX", help="With --tensors, list only tensors whose name matches.")
    ] = None,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is: architecture, format, size, the scheme of every group of layers, and who reads it.

    The command reads headers only, so it is fast for a model of any size. With --tensors it reads every number, in
    constant memory. With --json, tensors are one JSON line each.

    Examples:

      qtool inspect SmolLM2-135M-w8a8

      qtool quantize SmolLM2-135M | qtool inspect - --json

      qtool inspect SmolLM2-135M-w8a8 --tensors --filter 'layers\\.0\\..*scale'
    """
    from qtool import patterns
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.checkpoint.summary import summarize
    from qtool.errors import InputError
    from qtool.runtimes.table import as_it_is

    if filter is not None and not tensors:
        raise InputError("goes with --tensors", where="--filter")
    try:
        patterns.check(filter or "")
    except ValueError as error:
        raise InputError(str(error), where="--filter") from None
    with console() as out:
        checkpoint = Checkpoint.open(find_model(path, out).path)
    if tensors:
        _tensors(checkpoint, filter or "")
        return
    summary, ways = summarize(checkpoint), as_it_is(checkpoint)
    out = console()
    if json:
        out.result(summary | {"runtimes": [asdict(way) for way in ways]})
        return
    format = formats.of(checkpoint)
    described = f"{format.name}: {format.title}"
    out.table(summary["path"], ["", ""], _facts(summary | {"format": described}), result=True)
    groups = [(g["layers"], g["count"], g["scheme"], " x ".join(map(str, g["shape"]))) for g in summary["layers"]]
    out.table("Layers", ["layers", "count", "scheme", "shape"], groups, result=True)
    known = [way for way in ways if not format.is_float or way.answer == "no"]
    if known:
        rows = [(f"{way.runtime} {way.version}", way.answer, way.why, way.checked) for way in known]
        out.table("Runtimes", ["runtime", "reads it", "why, or how", "checked"], rows, result=True)


def _tensors(checkpoint: Checkpoint, pattern: str) -> None:
    from qtool import patterns, workers
    from qtool.environments.lookup import interpreter

    python = interpreter("native")
    with console() as out:
        as_text = not out.json
        wanted = [name for name in checkpoint.names if patterns.search(pattern, name, where="--filter")]
        columns = _columns(checkpoint, wanted)
        if as_text:
            out.result(columns.format(*_TITLES).rstrip(), more=True)

        def show(event: workers.Event) -> None:
            if event["event"] == "item":
                row = event["data"]
                out.result(columns.format(*_cells(row)).rstrip() if as_text else row, more=True)
            elif not as_text:  # the rows themselves show how far it is
                out.event(event)

        job = {"model": str(checkpoint.path.absolute()), "filter": pattern or None}
        found = workers.run("qtool.checkpoint.ranges", job, python=python, on_event=show)
        out.info(f"{found['tensors']} tensors, {sizes.show(found['bytes'])}")


_TITLES = ("name", "dtype", "shape", "bytes", "min", "max", "scheme", "scales")


def _columns(checkpoint: Checkpoint, names: list[str]) -> str:
    """A line's format, wide enough for what the headers tell; so rows can be printed as they come."""
    infos = [checkpoint.info(name) for name in names]
    name = max((len(ascii(info.name)) - 2 for info in infos), default=4)
    shape = max((len(_shape(info.shape)) for info in infos), default=5)
    return f"{{:<{name}}}  {{:<5}}  {{:<{max(5, shape)}}}  {{:>13}}  {{:>10}}  {{:>10}}  {{:<12}}  {{}}"


def _cells(row: dict[str, Any]) -> list[str]:
    scales = f"{row['scale_min']:.4g} to {row['scale_max']:.4g}" if row.get("scale_min") is not None else ""
    bad = f"{row['nonfinite']} not finite" if row["nonfinite"] else ""
    return [
        ascii(row["name"])[1:-1],  # no name can play tricks on a terminal
        row["dtype"],
        _shape(row["shape"]),
        f"{row['bytes']:,}",
        _number(row["min"]),
        _number(row["max"]),
        row.get("scheme", ""),
        ", ".join(filter(None, [scales, bad])),
    ]


def _shape(shape: list[int] | tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(summary: dict[str, Any]) -> list[list[str]]:
    parameters, float_bytes = summary["parameters"], summary["bytes_bf16"]
    files = f"{summary['files']} file{'s' if summary['files'] > 1 else ''}"
    facts = {
        "architecture": summary["architecture"],
        "format": summary["format"],
        "dtype": summary["dtype"],
        "parameters": None if parameters is None else f"{parameters:,}",
        "size": f"{sizes.show(summary['bytes_on_disk'])} in {files}",
        "key/value cache": summary["kv_cache"],
        "in bfloat16": float_bytes
        and f"{sizes.show(float_bytes)}, so this is {summary['bytes'] / float_bytes:.0%} of it",
    }
    return [[name, str(value)] for name, value in facts.items() if value]
