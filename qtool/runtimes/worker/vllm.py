"""vLLM, driven through its engine rather than its `LLM` class: less to import, and answers come as they finish.

Prompts come in while answers go out, so a job of any length needs the memory of what is being worked on and no more.
On a CPU the engine runs in this very process; the cold start is nearly all imports, so everything that would start
further interpreters is avoided.
"""

from __future__ import annotations

import gc
import importlib
import os
import threading
import time
from typing import Any

from qtool.checkpoint import config as claims
from qtool.errors import ForeignError, InputError, QtoolError, WorkerDied, foreign, in_one_line
from qtool.runtimes import facts, kernels
from qtool.runtimes.job import WorkerJob
from qtool.runtimes.worker.front import Front, Prepared
from qtool.runtimes.worker.meter import Meter
from qtool.runtimes.worker.vllm_loop import Intake, Loop, refusals
from qtool.runtimes.worker.vllm_settings import Ahead, arguments, check_settings
from qtool.workers import POLL_SECONDS, Report, hide_media_packages


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Answer `report.inputs` as `qtool.runtimes.stream` says. `job` is a `WorkerJob`, the result a `Generated`."""
    hide_media_packages(keep_torchvision=True)
    read = WorkerJob.from_json(job)
    runtime = facts.get(read.runtime)
    try:
        for module in runtime.first:
            importlib.import_module(module)
        return _generate(read, report)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ForeignError) else error
        if cause is None or (isinstance(cause, QtoolError)) or (known := runtime.explain(cause)) is None:
            raise
        raise known from cause


def _generate(job: WorkerJob, report: Report) -> dict[str, Any]:
    meter = Meter(report)
    report.progress("start vLLM", 0, 0)
    gc.disable()  # the imports make millions of objects that stay
    from vllm import EngineArgs, ModelRegistry

    kernels.register()
    meter.lap("import")
    check_settings(job.arguments, EngineArgs)
    front = Front(job, report)
    if claims.context(front.config) != front.text_config.get("max_position_embeddings"):
        front.limit(_context(job))
    intake = Intake(front, report)
    first = intake.ahead()
    meter.lap("tokenize")
    if intake.ended and not first:
        return meter.end(job.runtime)
    if in_process := os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        _know_the_model(ModelRegistry, front.config, job.model)
    gc.freeze()
    gc.enable()
    report.progress("load the model", 0, 0)
    engine, seqs = _load(job, arguments(front, _measured(first, intake), in_process))
    front.context = min(front.context, engine.model_config.max_model_len)
    if not in_process:
        threading.Thread(target=_wake, args=(engine.engine_core,), daemon=True).start()
    meter.lap("load")
    meter.begin()
    try:
        Loop(engine, front, report, meter, seqs).run(first, intake)
    except _dead() as error:
        hint = "If memory ran out, ask for less at once: --set max_num_seqs=8, or fewer."
        raise WorkerDied("vLLM's engine, a process of its own, has ended", hint=hint) from error
    front.warn()
    return meter.end(job.runtime)


def _measured(first: list[Prepared], intake: Intake) -> Ahead:
    return Ahead([len(prepared.ids) + prepared.budget for prepared in first], intake.ended)


def _load(job: WorkerJob, given: dict[str, Any]) -> tuple[Any, int | None]:
    """vLLM's LLMEngine with the model in it, and how many requests it works on at a time."""
    from vllm import EngineArgs, LLMEngine

    try:
        with foreign("vLLM can't load this model", where=job.model):
            configured = EngineArgs(**given)
            return LLMEngine.from_engine_args(configured), configured.max_num_seqs
    except ForeignError as error:
        cause = error.__cause__
        assert cause is not None
        if "Engine core" in str(cause):  # a process of its own, whose end says nothing of why
            raise cause from None
        if "No Int8 MoE backend" in str(cause):
            # vllm 0.32: experts/cpu_moe.py and zentorch_moe.py in model_executor/layers/fused_moe
            hint = (
                "On CPUs they need AMX, or zentorch on an AMD processor with AVX-512; and of models those that choose "
                "experts by softmax alone, with SiLU between their linears (Qwen3, Mixtral). `qtool convert --to "
                "bfloat16` makes a model of the same weights that runs here."
            )
            what = "vLLM has no int8 experts for this processor and this model"
            raise QtoolError(what, where=job.model, hint=hint) from cause
        if job.arguments and isinstance(cause, refusals()):
            raise InputError(f"vLLM refuses these settings: {in_one_line(cause)}", where="--set") from cause
        raise


def _context(job: WorkerJob) -> int:
    """Tokens that vLLM takes for this model by its own rule, which goes on where positions are scaled."""
    from vllm import EngineArgs

    wanted = {name: value for name, value in job.arguments.items() if name in ("hf_overrides", "hf_config_path")}
    with foreign("vLLM can't read this model's config.json", where=job.model):
        asked = EngineArgs(model=job.model, dtype=job.dtype, trust_remote_code=job.trust_remote_code, **wanted)
        return int(asked.create_model_config().max_model_len)


def _dead() -> type[Exception]:
    """How vLLM says that the engine's process has gone; asked for only where something has been raised."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def _wake(client: Any) -> None:
    """Tell vLLM's client that its engine was killed: it knows (0.32, SyncMPClient), and waits for it for ever."""
    while not client.resources.engine_dead:
        time.sleep(POLL_SECONDS)
    client.outputs_queue.put(_dead()())


def _know_the_model(registry: Any, config: dict[str, Any], model: str) -> None:
    """Import the model's class here, where it is needed anyway: vLLM would start an interpreter to look at it.

    Raises QtoolError where it needs a package that isn't there: vLLM would say that it "failed to be inspected".
    """
    for architecture in config.get("architectures") or []:
        if known := registry.models.get(architecture):
            try:
                registry.register_model(architecture, known.load_model_cls())
            except ImportError as error:
                if error.name is None:
                    raise
                raise _needs(architecture, error.name.partition(".")[0], model) from error


def _needs(architecture: str, package: str, model: str) -> QtoolError:
    hint = f"Install {package} where vLLM is."
    if package == "torchvision":
        hint = (
            "Install the build for the torch that vLLM has, even for text alone. For CPUs: pip install torchvision "
            "--index-url https://download.pytorch.org/whl/cpu"
        )
    return QtoolError(f"vLLM's {architecture} needs a package that isn't here: {package}", where=model, hint=hint)
