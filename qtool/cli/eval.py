"""`qtool eval`: a quantized model against its original."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.evaluate.intervals import Estimate


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
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare a quantized model with its original: perplexity, KL divergence, top-1 agreement.

    Both run in float32, layer by layer, the quantized one with its integers' rounding; neither is ever whole in
    memory. Each figure has a 95 % confidence interval over the windows. On a terminal the result is a table, else
    JSON.

    Examples:

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --text held-out.txt

      qtool quantize ./SmolLM2-135M | qtool eval ./SmolLM2-135M - --json
    """
    from qtool import workers
    from qtool.checkpoint.reader import Checkpoint
    from qtool.environments.lookup import interpreter

    folders = [Path(path_or_stdin(value)).expanduser().absolute() for value in (base, quantized)]
    for folder in folders:
        Checkpoint.open(folder)  # whatever is wrong should show before torch is imported
    job = {
        "base": str(folders[0]),
        "quantized": str(folders[1]),
        "text": text if text == "builtin" else str(Path(text).expanduser().absolute()),
        "windows": windows,
        "length": length,
        "trust_remote_code": trust_remote_code,
    }
    python = interpreter("native")
    with console() as out:
        result = workers.run("qtool.evaluate.worker", job, python=python, on_event=out.event)
    out.info(f"{result['seconds']:.0f} s, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB")
    if json or not sys.stdout.isatty():
        out.result(result)
    else:
        _show(result, out)


def _show(result: dict[str, Any], out: Console) -> None:
    text = result["text"]
    title = (
        f"{Path(result['quantized']).name} against {Path(result['base']).name}, "
        f"{text['windows']} x {text['length']} tokens of {text['source']}"
    )
    rows = [
        _row("perplexity, base", result["base_perplexity"], ".3f"),
        _row("perplexity, quantized", result["quantized_perplexity"], ".3f"),
        _row("perplexity, quantized / base", result["perplexity_ratio"], ".4f"),
        _row("KL divergence, nats per token", result["kl_divergence"], ".5f"),
        _row("top-1 agreement", result["top1_agreement"], ".2%"),
    ]
    out.table(title, ["", "mean", "95 % interval"], rows, result=True)


def _row(name: str, figure: Estimate, form: str) -> list[str]:
    low, high = figure["low"], figure["high"]
    interval = "" if low is None or high is None else f"{low:{form}} to {high:{form}}"
    return [name, f"{figure['value']:{form}}", interval]
