"""`qtool eval`: a quantized model against its original."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.console import Console


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The folder of the original model.")],
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="The folder of its quantized version; - reads it from stdin.")
    ],
    text: Annotated[
        str, typer.Option("--text", metavar="FILE|builtin", help="What to predict: .txt, .jsonl, .parquet or built-in.")
    ] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text, from its start.")] = 24,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    runtime: Annotated[
        Literal["qtool", "vllm"],
        typer.Option(help="Who runs the quantized model: qtool, layer by layer in float32, or vLLM, whole."),
    ] = "qtool",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Also make a page with plots, in one file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report if it exists.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare a quantized model with its original: perplexity, KL divergence, agreement of the likeliest tokens.

    Both run in float32, layer by layer, the quantized one with its integers' rounding; neither is ever whole in
    memory. With --runtime vllm the quantized one runs in vLLM instead. Each figure has a 95 % confidence interval over
    the windows. On a terminal the result is a table, else JSON. The figures are kept in the quantized model's
    qtool.json, for its model card.

    Examples:

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --text held-out.txt

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --runtime vllm --report smollm2.html

      qtool quantize ./SmolLM2-135M | qtool eval ./SmolLM2-135M - --json
    """
    from qtool import workers
    from qtool.checkpoint.reader import Checkpoint
    from qtool.environments.lookup import interpreter
    from qtool.evaluate import facts, record
    from qtool.evaluate import report as page

    folders = [Path(path_or_stdin(value)).expanduser().absolute() for value in (base, quantized)]
    checkpoints = [Checkpoint.open(folder) for folder in folders]  # what is wrong shows before torch is imported
    if report is not None:
        page.check(report, overwrite=overwrite)
    python, engine, env = _vllm(checkpoints[1].format) if runtime == "vllm" else (interpreter("native"), {}, {})
    job = {
        "base": str(folders[0]),
        "quantized": str(folders[1]),
        "text": text if text == "builtin" else str(Path(text).expanduser().absolute()),
        "windows": windows,
        "length": length,
        "runtime": None if runtime == "qtool" else runtime,
        "engine": engine,
        "trust_remote_code": trust_remote_code,
    }
    with console() as out:
        result = workers.run("qtool.evaluate.worker", job, python=python, env=env, on_event=out.event)
        result["sizes"] = {key: facts.sizes(of) for key, of in zip(("base", "quantized"), checkpoints, strict=True)}
        result["groups"] = facts.groups(checkpoints[1])
        if report is not None:
            page.write(report, result)
            out.info(f"report: {report.absolute()}")
        if checkpoints[1].format != "float" and (reason := record.keep(folders[1], result)):
            out.info(f"the figures are not kept in the quantized model: {reason}")
    out.info(f"{result['seconds']:.0f} s, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB")
    if json or not sys.stdout.isatty():
        out.result(result)
    else:
        _show(result, page.rows(result), out)


def _vllm(format: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """vLLM's interpreter, arguments and environment on this machine."""
    from qtool import runtime

    chosen = runtime.choose("vllm", format)
    if chosen.name != "vllm":
        raise InputError(
            f"vLLM reads {format} checkpoints through {chosen.name} only, which --runtime vllm can't look into",
            where="--runtime",
            hint="leave it out: qtool computes what that runtime does with the same integers",
        )
    return chosen.python, chosen.engine, {**chosen.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _show(result: dict[str, Any], rows: list[tuple[str, str, str]], out: Console) -> None:
    text, runtime = result["text"], result["runtime"]
    title = (
        f"{Path(result['quantized']).name} against {Path(result['base']).name}, "
        f"{text['windows']} x {text['length']} tokens of {text['source']}"
        + (f", in {runtime['name']} ({runtime['dtype']})" if runtime["name"] != "qtool" else "")
    )
    out.table(title, ["", "value", "95 % interval"], rows, result=True)
