"""`qtool eval`: a quantized model against its original."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtool.calibration.sources import BUILTIN, absolute
from qtool.cli.measuring import WindowLength
from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin
from qtool.errors import InputError
from qtool.files import expand, is_dir

if TYPE_CHECKING:
    from qtool.console import Console


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The folder of the original model.")],
    quantized: Annotated[
        str | None,
        typer.Argument(metavar="QUANTIZED", help="The folder of its quantized version; - reads it from stdin."),
    ] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="FILE|builtin", help="What to predict: .txt, .jsonl, .parquet or built-in.")
    ] = BUILTIN,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text, from its start.")] = 24,
    length: WindowLength = 512,
    runtime: Annotated[
        Literal["qtool", "vllm"],
        typer.Option(help="Who runs the quantized model: qtool, layer by layer in float32, or vLLM, whole."),
    ] = "qtool",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Also make a page with plots, in one file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report if it exists.")] = False,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Solve tasks of lm-evaluation-harness instead, in vLLM.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The tasks' data: data sets' repositories, or tasks of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task. Default: all.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare a quantized model with its original: perplexity, KL divergence, agreement of the likeliest tokens.

    Both run in float32, layer by layer, the quantized one with its integers' rounding; neither is ever whole in
    memory. With --runtime vllm the quantized one runs in vLLM instead. Each figure has a 95 % confidence interval over
    the windows. A terminal gets a table; a pipe gets JSON, and the table is on standard error then. The figures are
    kept in the quantized model's qtool.json, for its model card.

    With --tasks, one model or both solve tasks such as gsm8k, ceval or mmlu, from files in --data, without the network.

    Examples:

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --text held-out.txt

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --runtime vllm --report smollm2.html

      qtool eval ./SmolLM2-135M-w8a8 --tasks gsm8k,ceval --data ./datasets

      qtool quantize ./SmolLM2-135M | qtool eval ./SmolLM2-135M - --json
    """
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.evaluation import facts, record
    from qtool.evaluation import report as page
    from qtool.evaluation.job import ComparisonJob, EvaluationText, TasksJob, run, solve
    from qtool.jobs.evaluate import vllm_for

    models = [value for value in (base, quantized) if value is not None]
    folders = [expand(path_or_stdin(value)).absolute() for value in models]
    checkpoints = [Checkpoint.open(folder) for folder in folders]  # what is wrong shows before torch is imported
    if tasks is not None:
        if data is None or not is_dir(data):
            raise InputError("say where the tasks' data is", where="--data", hint="a folder; see qtool eval --help")
        jobs = [
            TasksJob(
                model=checkpoint.path,
                tasks=[name.strip() for name in tasks.split(",") if name.strip()],
                data=expand(data).absolute(),
                vllm=vllm_for(checkpoint),
                limit=limit,
                fewshot=fewshot,
                chat=chat,
                trust_remote_code=trust_remote_code,
            )
            for checkpoint in checkpoints
        ]
        with console() as out:
            solved = [{"model": str(job.model), **asdict(solve(job, out.event))} for job in jobs]
        piped = json or not sys.stdout.isatty()
        _show_tasks(solved, out, result=not piped)
        if piped:
            out.result(solved)
        return
    if len(folders) < 2:
        raise InputError("compare with what?", where="QUANTIZED", hint="give a quantized model too, or --tasks")
    if report is not None:
        page.check(report, overwrite=overwrite)
    job = ComparisonJob(
        base=folders[0],
        quantized=folders[1],
        text=EvaluationText(absolute(text), windows=windows, length=length),
        vllm=vllm_for(checkpoints[1]) if runtime == "vllm" else None,
        trust_remote_code=trust_remote_code,
    )
    sizes = {key: facts.sizes(of) for key, of in zip(("base", "quantized"), checkpoints, strict=True)}
    details = {"sizes": sizes, "groups": facts.groups(checkpoints[1])}
    with console() as out:
        result = run(job, out.event).to_json() | details
        if not formats.of(checkpoints[1]).is_float and (reason := record.keep(folders[1], result)):
            out.info(f"the figures are not kept in the quantized model: {reason}")
    out.info(f"{result['seconds']:.0f} s, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB")
    piped = json or not sys.stdout.isatty()
    _show(result, page.rows(result), out, result=not piped)
    if piped:
        out.result(result)
    if report is not None:  # last: a full disk must not cost the figures
        page.write(report, result)
        out.info(f"report: {report.absolute()}")


def _show_tasks(solved: list[dict[str, Any]], out: Console, *, result: bool) -> None:
    rows = []
    for model in solved:
        for task, metrics in model["tasks"].items():
            for metric, figure in metrics.items():
                low, high = figure["low"], figure["high"]
                interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
                rows.append([Path(model["model"]).name, task, metric, f"{figure['value']:.4f}", interval])
    out.table("Tasks", ["model", "task", "metric", "value", "95 % interval"], rows, result=result)


def _show(found: dict[str, Any], rows: list[tuple[str, str, str]], out: Console, *, result: bool) -> None:
    text, runtime = found["text"], found["runtime"]
    title = (
        f"{Path(found['quantized']).name} against {Path(found['base']).name}, "
        f"{text['windows']} x {text['length']} tokens of {text['source']}"
        + (f", in {runtime['name']} ({runtime['dtype']})" if runtime["name"] != "qtool" else "")
    )
    out.table(title, ["", "value", "95 % interval"], rows, result=result)
