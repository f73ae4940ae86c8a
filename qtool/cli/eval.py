"""`qtool eval`: a quantized model against its original."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from qtool.calibration.sources import BUILTIN
from qtool.cli.bundle import expanded
from qtool.cli.measuring import WindowLength
from qtool.cli.options import Offline, Printed, TrustRemoteCode, console, find_model
from qtool.errors import InputError
from qtool.files import expand, is_dir

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.console import Console


@dataclass(frozen=True)
class Prediction:
    """What is predicted, and by whom."""

    panel: ClassVar[str] = "Comparison"

    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE|builtin",
            help="The text to predict: a .txt, .jsonl or .parquet file, or the built-in text.",
        ),
    ] = BUILTIN
    windows: Annotated[int, typer.Option(min=1, help="The number of windows, from the start of the text.")] = 24
    length: WindowLength = 512
    runtime: Annotated[
        Literal["qtool", "vllm"],
        typer.Option(
            help="The runtime of the quantized model: qtool runs it layer by layer in float32, vLLM runs it whole."
        ),
    ] = "qtool"


@dataclass(frozen=True)
class Page:
    """The page with plots."""

    panel: ClassVar[str] = "Report"

    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a report with plots to this HTML file.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report if it exists.")] = False


@dataclass(frozen=True)
class Tasks:
    """Tasks to solve instead."""

    panel: ClassVar[str] = "Tasks"

    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Solve these tasks of lm-evaluation-harness in vLLM, instead of comparing."
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder with copies of the tasks' data sets, or with your own tasks."),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="The number of documents of each task.", show_default="all")
    ] = None
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="The number of examples before each question.", show_default="the task's"),
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Ask with the model's chat template.")] = False


@expanded
def evaluate(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The original model: a folder, ORG/NAME on a hub or a GGUF file.")
    ],
    quantized: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUANTIZED...",
            help="Its quantized version, named in the same way, or - to read it from standard input. Give several to "
            "compare them with each other; the original is computed once.",
        ),
    ] = None,
    *,
    prediction: Prediction,
    page: Page,
    tasks: Tasks,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    printed: Printed,
) -> None:
    """Compare quantized models with their original: perplexity, KL divergence, agreement of the likeliest tokens.

    All models run in float32, layer by layer, so none is whole in memory. A quantized one is rounded as its checkpoint
    says. With --runtime vllm it runs in vLLM instead. Each figure has a 95 % confidence interval over the windows. With
    --json the result is an object, or a list for several models. The figures are also written to the quantized model's
    qtool.json, for its model card.

    With --tasks, one or both models solve tasks such as gsm8k, ceval or mmlu. Their data comes from the folder --data,
    without the network.

    Examples:

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --text held-out.txt

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 --runtime vllm --report smollm2.html

      qtool eval ./SmolLM2-135M ./SmolLM2-135M-w8a8 ./SmolLM2-135M-w8a8-dynamic --report compared.html

      qtool eval ./SmolLM2-135M-w8a8 --tasks gsm8k,ceval --data ./datasets

      qtool quantize ./SmolLM2-135M | qtool eval ./SmolLM2-135M - --json
    """
    with console("starting") as out:
        models = [str(find_model(value, out).path) for value in (base, *(quantized or ()))]
    if tasks.tasks is not None:
        _solve(models, tasks.tasks, tasks, trust_remote_code=trust_remote_code)
    else:
        _compare(models, prediction, page, trust_remote_code=trust_remote_code)


def _solve(models: list[str], names: str, tasks: Tasks, *, trust_remote_code: bool) -> None:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.evaluation.job import TasksJob, solve
    from qtool.jobs.evaluate import vllm_for

    checkpoints = [Checkpoint.open(expand(model).absolute()) for model in models]
    if tasks.data is None or not is_dir(tasks.data):
        raise InputError("say where the tasks' data is", where="--data", hint="a folder; see qtool eval --help")
    jobs = [
        TasksJob(
            model=checkpoint.path,
            tasks=[name.strip() for name in names.split(",") if name.strip()],
            data=expand(tasks.data).absolute(),
            vllm=vllm_for(checkpoint),
            limit=tasks.limit,
            fewshot=tasks.fewshot,
            chat=tasks.chat,
            trust_remote_code=trust_remote_code,
        )
        for checkpoint in checkpoints
    ]
    with console("starting") as out:
        solved = [{"model": str(job.model), **asdict(solve(job, out.event))} for job in jobs]
    _show_tasks(solved, out, result=not out.json)
    if out.json:
        out.result(solved)


def _compare(models: list[str], prediction: Prediction, page: Page, *, trust_remote_code: bool) -> None:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.evaluation import facts, verdict
    from qtool.evaluation import report as pages
    from qtool.evaluation.job import EvaluationText, run
    from qtool.jobs import evaluate as jobs

    if len(models) < 2:
        Checkpoint.open(expand(models[0]).absolute())
        raise InputError("the quantized model is missing", where="QUANTIZED", hint="give one after BASE, or --tasks")
    if page.report is not None:
        pages.check(page.report, overwrite=page.overwrite)
    opened = jobs.opened(*models)
    text = EvaluationText(prediction.text, prediction.windows, prediction.length)
    job = jobs.comparison(opened, text, prediction.runtime, trust_remote_code=trust_remote_code)
    base = facts.sizes(opened.base)
    details = [
        {
            "sizes": {"base": base, "quantized": facts.sizes(checkpoint)},
            "made": facts.made(checkpoint),
            "groups": facts.groups(checkpoint),
        }
        for checkpoint in opened.quantized
    ]
    with console("starting") as out:
        found = [comparison.to_json() | more for comparison, more in zip(run(job, out.event), details, strict=True)]
        for checkpoint, result in zip(opened.quantized, found, strict=True):
            _keep(checkpoint, result, out)
    out.info(f"{found[0]['seconds']:.0f} s, peak memory {found[0]['peak_memory_bytes'] / 1e9:.2f} GB")
    _show(found, out, result=not out.json)
    for sentence in verdict.of_all(found):
        out.info(sentence, prose=True)
    if out.json:
        out.result(found[0] if len(found) == 1 else found)
    if page.report is not None:  # last: a full disk must not cost the figures
        with console("writing the report"):
            pages.write(page.report, found, command=shlex.join(["qtool", *sys.argv[1:]]))
        out.info(f"report: {page.report.absolute()}")


def _keep(checkpoint: Checkpoint, result: dict[str, Any], out: Console) -> None:
    """The figures in the quantized model's qtool.json."""
    from qtool.checkpoint import formats
    from qtool.evaluation import record

    if not formats.of(checkpoint).is_float and (reason := record.keep(checkpoint.path, result)):
        out.info(f"the figures are not kept in {checkpoint.path}: {reason}")


def _show_tasks(solved: list[dict[str, Any]], out: Console, *, result: bool) -> None:
    rows = []
    for model in solved:
        for task, metrics in model["tasks"].items():
            for metric, figure in metrics.items():
                low, high = figure["low"], figure["high"]
                interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
                rows.append([Path(model["model"]).name, task, metric, f"{figure['value']:.4f}", interval])
    out.table("Tasks", ["model", "task", "metric", "value", "95 % interval"], rows, result=result)


def _show(found: list[dict[str, Any]], out: Console, *, result: bool) -> None:
    from qtool.evaluation import report as pages
    from qtool.evaluation import verdict

    text, runtime = found[0]["text"], found[0]["runtime"]
    names = verdict.names(found)
    title = (
        f"{names[0] if len(names) == 1 else f'{len(names)} models'} against {Path(found[0]['base']).name}, "
        f"{text['windows']} x {text['length']} tokens of {text['source']}"
        + (f", in {runtime['name']} ({runtime['dtype']})" if runtime["name"] != "qtool" else "")
    )
    if len(found) == 1:
        out.table(title, ["", "value", "95 % interval"], pages.rows(found[0]), result=result)
    else:
        columns, *rows = pages.overview(found)
        out.table(title, columns, rows, result=result)
