"""The worker process that has a model solve lm-evaluation-harness's tasks (lm_eval 0.4.13) in vLLM, offline."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtool.calibration import template
from qtool.errors import ForeignError, InputError, QtoolError, foreign, in_one_line
from qtool.evaluation import cache
from qtool.evaluation.intervals import Estimate, estimate_share
from qtool.evaluation.job import SolvedTasks, TasksJob
from qtool.runtimes import kernels
from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report

_NAMES = {"ceval": "ceval-valid"}  # what people call it: what the harness calls it
_MOST_CACHE_BYTES = 4 << 30
_Z = 1.96  # standard errors to either side of a 95 % interval


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run `solve`: a `TasksJob` and `SolvedTasks`, both as JSON."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    hide_media_packages(keep_torchvision=True)
    return asdict(solve(TasksJob.from_json(job), report))


def solve(job: TasksJob, report: Report) -> SolvedTasks:
    """Have one model solve tasks. The job's data becomes the working directory, where `datasets` looks first.

    Raises:
        InputError: no such task, its data is not in the folder, or lm_eval is not installed here.
        QtoolError: the harness gives no results.
    """
    report.progress("import lm_eval", 0, 0)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"the tasks need the Python package lm_eval beside vLLM: {in_one_line(error)}",
            hint="pip install lm-eval there, or name an interpreter that has both: QTOOL_VLLM_PYTHON",
        ) from None
    _name_vllm()
    kernels.register()
    os.chdir(job.data)
    with foreign("a task there can't be read", where=str(job.data)):
        manager = TaskManager(include_path=str(job.data))
    names = [_NAMES.get(name, name) for name in job.tasks]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(
            f"no task is named {unknown[0]!r}",
            where="--tasks",
            hint="lm_eval ls tasks lists them; your own are YAML files in --data",
        )
    report.progress("run " + ", ".join(names), 0, 0)
    template.limit_everywhere()
    try:
        with foreign("the tasks can't be done", where=str(job.data)):
            found = lm_eval.simple_evaluate(
                model="vllm",
                model_args=_model_arguments(job),
                tasks=names,
                task_manager=manager,
                num_fewshot=job.fewshot,
                limit=job.limit,
                apply_chat_template=job.chat,
                log_samples=False,
            )
    except ForeignError as error:
        if not isinstance(error.__cause__, FileNotFoundError | ConnectionError):
            raise
        raise InputError(
            f"the data of {', '.join(names)} can't be read: {in_one_line(error.__cause__)}",
            where=str(job.data),
            hint="put copies of the data sets' repositories there, such as openai/gsm8k",
        ) from error
    if found is None:
        raise QtoolError("the harness gave no results")
    documents = {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()}
    tasks = {name: metrics(row, documents.get(name)) for name, row in found["results"].items()}
    return SolvedTasks(tasks, documents)


def _name_vllm() -> None:
    """The harness asks for the version of a distribution "vllm"; builds for other hardware go by other names."""
    platforms = importlib.import_module("vllm.platforms")
    assert platforms.current_platform  # vLLM looks at that version too, once, to tell what it was built for
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return str(importlib.import_module("vllm").__version__)

    importlib.metadata.version = version


def _model_arguments(job: TasksJob) -> dict[str, Any]:
    import torch

    from qtool.checkpoint.reader import Checkpoint

    arguments: dict[str, Any] = {
        "pretrained": str(job.model),
        "trust_remote_code": job.trust_remote_code,
        **job.vllm.engine,
    }
    if not torch.cuda.is_available():  # vLLM for CPUs takes, and touches, most of the machine's memory by itself
        config = Checkpoint.open(job.model).config
        one = cache.context(config) * cache.bytes_per_token(config)
        wanted = job.vllm.engine.get("max_num_seqs", 64) * one
        arguments["kv_cache_memory_bytes"] = min(wanted, max(_MOST_CACHE_BYTES, one))
    return arguments


def metrics(row: Mapping[str, Any], documents: int | None) -> dict[str, Estimate]:
    """The harness's "acc,none" and "acc_stderr,none" as figures with 95 % intervals.

    Args:
        documents: how many there were, if known. Metrics whose standard error is that of so many documents, each
            right or wrong, get the interval of a share.
    """
    figures: dict[str, Estimate] = {}
    for key, value in row.items():
        metric, _, filter_name = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float) or not filter_name:
            continue
        error = row.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        if not isinstance(error, int | float):
            figures[name] = {"value": float(value), "low": None, "high": None}
        elif _is_share(value, error, documents):
            assert documents is not None
            figures[name] = estimate_share(float(value), documents)
        else:
            figures[name] = {"value": float(value), "low": value - _Z * error, "high": value + _Z * error}
    return figures


def _is_share(value: float, error: float, documents: int | None) -> bool:
    if documents is None or documents < 2 or not 0 <= value <= 1:
        return False
    return math.isclose(error, math.sqrt(value * (1 - value) / (documents - 1)), rel_tol=1e-6, abs_tol=1e-12)
