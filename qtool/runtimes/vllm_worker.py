"""vLLM, driven through its engine rather than its `LLM` class: less to import, and answers come as they finish.

Prompts come in while answers go out, so a job of any length needs the memory of what is being worked on and no more.
On a CPU the engine runs in this very process; the cold start is nearly all imports, so everything that would start
further interpreters is avoided.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qtool.errors import InputError, QtoolError, WorkerDied, in_one_line
from qtool.runtimes import facts, int8_kernel
from qtool.runtimes.common import Front, Meter, Prepared, failure
from qtool.workers import POLL_SECONDS, READ_AHEAD, Report, hide_media_packages

BLOCK = 128  # tokens in a block of vLLM's CPU cache
SETTLE_SECONDS = 0.2  # inputs that come one by one, further apart than this, are not waited for before the model loads
IMPOSSIBLE = -9999.0  # vLLM's server says so too, where a token can't come: JSON has no infinity
QUEUED = 2  # requests that vLLM is given, as a multiple of those it works on at a time


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Generate as `qtool.runtimes.stream` says; returns what was done, and the seconds each stage took."""
    hide_media_packages()
    runtime = facts.get(job["runtime"])
    try:
        for module in runtime.first:
            importlib.import_module(module)
        return _generate(job, report)
    except QtoolError:
        raise
    except Exception as error:
        if (known := runtime.explain(error)) is not None:
            raise known from error
        raise


def _generate(job: dict[str, Any], report: Report) -> dict[str, Any]:
    meter = Meter(report)
    report.progress("start vLLM", 0, 0)
    gc.disable()  # the imports make millions of objects that stay
    from vllm import EngineArgs, LLMEngine, ModelRegistry

    int8_kernel.register()
    meter.lap("import")
    check_settings(job["set"], EngineArgs)
    front = Front(job, report)
    intake = _Intake(front, report)
    first = intake.ahead()
    meter.lap("tokenize")
    if intake.ended and not first:
        return meter.end(job["runtime"])
    if in_process := os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        _know_the_model(ModelRegistry, front.config)
    gc.freeze()
    gc.enable()
    report.progress("load the model", 0, 0)
    arguments = _arguments(job, front, [len(p.ids) + p.budget for p in first], intake.ended, in_process)
    try:
        configured = EngineArgs(**arguments)
        engine = LLMEngine.from_engine_args(configured)
    except refusals() as error:
        if job["set"]:
            raise InputError(f"vLLM refuses these settings: {in_one_line(error)}", where="--set") from error
        raise
    except RuntimeError as error:
        if "No Int8 MoE backend" not in str(error):
            raise
        # vllm 0.32: experts/cpu_moe.py and zentorch_moe.py in model_executor/layers/fused_moe
        hint = (
            "They need AMX, or zentorch on an AMD processor with AVX-512. `qtool convert --to bfloat16` makes a model "
        )
        hint += "of the same weights that runs here."
        raise QtoolError("vLLM has no int8 experts for this processor", where=job["model"], hint=hint) from error
    front.context = min(front.context, engine.model_config.max_model_len)
    if not in_process:
        threading.Thread(target=_wake, args=(engine.engine_core,), daemon=True).start()
    meter.lap("load")
    meter.begin()
    try:
        _Loop(engine, front, report, meter, configured.max_num_seqs).run(first, intake)
    except _dead() as error:
        hint = "If memory ran out, ask for less at once: --set max_num_seqs=8, or fewer."
        raise WorkerDied("vLLM's engine, a process of its own, has ended", hint=hint) from error
    front.warn()
    return meter.end(job["runtime"])


class _Intake:
    """Requests as they come, made ready; those that can't be answered are reported and left out."""

    def __init__(self, front: Front, report: Report) -> None:
        self.front, self.report = front, report

    @property
    def ended(self) -> bool:
        return self.report.inputs.ended

    def ahead(self) -> list[Prepared]:
        """What is there already, for the engine to be made to measure."""
        ready: list[Prepared] = []
        for _ in range(READ_AHEAD):
            if (request := self.report.inputs.take(SETTLE_SECONDS)) is None:
                break
            ready += self._ready(request)
        return ready

    def take(self, wait: bool) -> list[Prepared]:
        """The next request, or none: it can't be answered, it isn't there yet, or there are no more."""
        request = self.report.inputs.take(None if wait else 0)
        return [] if request is None else self._ready(request)

    def aborted(self) -> list[int]:
        """Requests that are wanted no longer; each is told once."""
        told = list(self.report.inputs.aborted)
        self.report.inputs.aborted.difference_update(told)
        return told

    def _ready(self, request: Mapping[str, Any]) -> list[Prepared]:
        try:
            return [self.front.prepare(request)]
        except InputError as error:
            self.report.item(failure(request["index"], error))
            return []


class _Loop:
    """Keeps vLLM's scheduler fed, and sends each answer on its way."""

    def __init__(self, engine: Any, front: Front, report: Report, meter: Meter, seqs: int | None) -> None:
        self.engine, self.front, self.report, self.meter = engine, front, report, meter
        self.window = QUEUED * (seqs or 256)
        self.running: dict[str, Prepared] = {}
        self.texts: dict[str, list[Any]] = {}
        self.split = reasoning(front) if front.job["reasoning_parser"] else None

    def run(self, first: Iterable[Prepared], intake: _Intake) -> None:
        for prepared in first:
            self._add(prepared)
        while self.running or not intake.ended:
            while not intake.ended and len(self.running) < self.window:
                before = len(self.running)
                for prepared in intake.take(wait=not self.running):
                    self._add(prepared)
                if len(self.running) == before and self.running:
                    break  # nothing there yet: work on what is
            for index in intake.aborted():
                self._abort(index)
            if self.running:
                for output in self.engine.step():
                    self._output(output)

    def _add(self, prepared: Prepared) -> None:
        try:
            parameters = _parameters(self.front, prepared)
            self.engine.add_request(str(prepared.index), {"prompt_token_ids": prepared.ids}, parameters)
        except refusals() as error:
            self.report.item(failure(prepared.index, InputError(f"vLLM refuses it: {in_one_line(error)}")))
            return
        self.running[str(prepared.index)] = prepared

    def _abort(self, index: int) -> None:
        """End a request that is wanted no longer; what there is of it is its answer."""
        if (prepared := self.running.pop(str(index), None)) is None:
            return
        self.engine.abort_request([str(index)])
        pieces = self.texts.pop(str(index), [])
        tokens = [token for piece in pieces for token in piece.token_ids]
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {"text": text, "token_ids": tokens, "finish_reason": "abort"}
        choice["completion_tokens"] = len(tokens)
        self.meter.add(len(tokens))
        self.report.item(self.front.answer(prepared, [choice]))

    def _output(self, output: Any) -> None:
        prepared = self.running[output.request_id]
        if self.front.job["stream"] and len(output.outputs) == 1:
            self._piece(output, prepared)
        if not output.finished:
            return
        del self.running[output.request_id]
        if any(choice.finish_reason == "error" for choice in output.outputs):
            self.report.item(failure(prepared.index, InputError("vLLM ended it with an error; its log may say which")))
            return
        choices = [self._choice(prepared, choice) for choice in sorted(output.outputs, key=lambda o: o.index)]
        self.meter.add(sum(choice["completion_tokens"] for choice in choices))
        item = self.front.answer(prepared, choices)
        if output.prompt_logprobs is not None:
            item["prompt_logprobs"] = [
                None if entry is None else _place(self.front, prepared.ids[i], entry)
                for i, entry in enumerate(output.prompt_logprobs)
            ]
        self.report.item(item)

    def _piece(self, output: Any, prepared: Prepared) -> None:
        """Tell what is new; and put the pieces together, so that the last output is the whole one."""
        piece = output.outputs[0]
        self.report.send(event="piece", index=prepared.index, text=piece.text)
        pieces = self.texts.setdefault(output.request_id, [])
        pieces.append(piece)
        if output.finished:
            del self.texts[output.request_id]
            piece.text = "".join(p.text for p in pieces)
            piece.token_ids = [token for p in pieces for token in p.token_ids]
            if piece.logprobs is not None:
                piece.logprobs = [entry for p in pieces for entry in p.logprobs]

    def _choice(self, prepared: Prepared, output: Any) -> dict[str, Any]:
        choice = {
            "text": output.text,
            "token_ids": list(output.token_ids),
            "finish_reason": output.finish_reason,
            "completion_tokens": len(output.token_ids),
        }
        if self.split is not None and prepared.chat:
            choice["reasoning"], choice["text"] = self.split(output.text)
        if prepared.sampling.get("logprobs") is not None:
            choice["logprobs"] = [
                _place(self.front, token, entry) for token, entry in zip(output.token_ids, output.logprobs, strict=True)
            ]
        if self.front.job["gaps"]:
            best = [sorted((e.logprob for e in entry.values()), reverse=True) for entry in output.logprobs]
            choice["gaps"] = [first - second for first, second, *_ in best]
        return choice


def _place(front: Front, token: int, entry: Mapping[int, Any]) -> dict[str, Any]:
    """One place's log-probabilities, as OpenAI's chat completions show them."""

    def shown(token: int) -> dict[str, Any]:
        text = entry[token].decoded_token
        logprob = max(round(entry[token].logprob, 6), IMPOSSIBLE)
        return {"token": text or "", "token_id": token, "logprob": logprob}

    top = sorted(entry, key=lambda token: entry[token].rank or 0)
    return shown(token) | {"top_logprobs": [shown(other) for other in top]}


def refusals() -> tuple[type[Exception], ...]:
    """How vLLM says that a request or a setting is wrong; pydantic's errors are ValueErrors too."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:  # before 0.32 or so
        return (ValueError, TypeError, OverflowError)
    return (ValueError, TypeError, OverflowError, VLLMClientError)


def _dead() -> type[Exception]:
    """How vLLM says that the engine's process has gone; asked for only where something has been raised."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def _wake(client: Any) -> None:
    """Tell vLLM's client that its engine was killed: it knows (0.32, SyncMPClient), and waits for it for ever."""
    while not client.resources.engine_dead:
        time.sleep(POLL_SECONDS)
    client.outputs_queue.put(_dead()())


def _parameters(front: Front, prepared: Prepared) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling = dict(prepared.sampling)
    if structured := sampling.pop("structured_outputs", None):
        sampling["structured_outputs"] = StructuredOutputsParams(**structured)
    if biases := sampling.get("logit_bias"):
        sampling["logit_bias"] = {int(token): bias for token, bias in biases.items()}  # JSON's keys are texts
    if front.job["gaps"]:
        sampling["logprobs"] = max(2, sampling.get("logprobs") or 0)
    if front.job["reasoning_parser"] and prepared.chat:
        sampling.setdefault("skip_special_tokens", False)
    streamed = front.job["stream"] and sampling.get("n", 1) == 1
    sampling |= {
        "seed": None if sampling.get("temperature") == 0 else prepared.seed,
        "stop_token_ids": prepared.stop,
        "ignore_eos": True,  # the stop ids say it all
        "output_kind": RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
    }
    return SamplingParams(**sampling)


def reasoning(front: Front) -> Callable[[str], tuple[str | None, str]]:
    """What splits a text into thinking (or None) and answer, by the parser that vLLM has for such models.

    Raises:
        InputError: vLLM has no parser of this name, or the tokenizer lacks the parser's marks.
    """
    try:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    except ImportError:  # an older vLLM, as Ascend has
        from vllm.entrypoints.openai.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    name = front.job["reasoning_parser"]
    request = ChatCompletionRequest(messages=[], model="")
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)
        parser(front.tokenizer, chat_template_kwargs=front.job["chat_template_kwargs"])
    except KeyError as error:
        hint = f"vLLM has {', '.join(sorted(ReasoningParserManager.list_registered()))}."
        raise InputError(f"no reasoning parser {name!r}", where="--reasoning-parser", hint=hint) from error
    except (RuntimeError, ValueError) as error:
        raise InputError(in_one_line(error), where=f"--reasoning-parser {name}") from error
    ends = [front.tokenizer.decode([token]) for token in front.stop]

    def split(text: str) -> tuple[str | None, str]:
        for end in ends:
            text = text.removesuffix(end)
        made = parser(front.tokenizer, chat_template_kwargs=front.job["chat_template_kwargs"])
        thought, answer = made.extract_reasoning(text, request)
        return thought, answer or ""

    return split


def check_settings(given: Mapping[str, Any], engine_args: type) -> None:
    """That vLLM knows each of these settings: fields of its EngineArgs, or (in capitals) its environment variables.

    Raises:
        InputError: it doesn't know one; with those of similar names.
    """
    import vllm.envs

    fields = {field.name: field.type for field in dataclasses.fields(engine_args)}
    for name in given:
        variable = name.isupper()
        known = [*vllm.envs.environment_variables, *THREADS] if variable else fields
        if name in known:
            if not variable:
                _check_type(name, given[name], fields[name])
            continue
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Similar: {', '.join(close)}." if close else "Its EngineArgs are named in vLLM's documentation."
        kind = "environment variable" if variable else "setting"
        raise InputError(f"vLLM has no {kind} {name!r}", where="--set", hint=hint)


def _check_type(name: str, value: Any, kind: Any) -> None:
    if isinstance(kind, str) or isinstance(value, dict):  # vLLM will look at it itself
        return
    import pydantic

    try:
        pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.PydanticUserError:  # a type that pydantic knows nothing of
        return
    except pydantic.ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"{name}: {what[:1].lower()}{what[1:]}, not {value!r}", where="--set") from None


THREADS = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
)


def _arguments(
    job: dict[str, Any], front: Front, lengths: list[int], complete: bool, in_process: bool
) -> dict[str, Any]:
    """What vLLM's EngineArgs get: this job's needs over the machine's settings, and the user's word over both.

    Args:
        lengths: tokens of the requests that are there already, with their answers.
        complete: there will be no others.
    """
    count = max(job["expected"], len(lengths))
    tokens = count * job["sampling"].get("max_tokens", front.context)
    arguments: dict[str, Any] = {
        "model": job["model"],
        "dtype": front.dtype,
        "seed": (job["sampling"].get("seed") or 0) % (1 << 32),  # for numpy; requests have their own
        "trust_remote_code": job["trust_remote_code"],
        "disable_log_stats": True,
        "generation_config": "vllm",
        "max_logprobs": -1,
        **job["engine"],
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}  # vLLM's own default
    if job["compile_from"] is not None and tokens >= job["compile_from"] and "enforce_eager" not in job["set"]:
        arguments["enforce_eager"] = False
    fit = arguments.get("max_model_len") == -1
    if fit:
        del arguments["max_model_len"]
    if complete:
        arguments.setdefault("max_model_len", max(lengths))
    per_token = _bytes_per_token(front)
    if not in_process or per_token is None or "kv_cache_memory_bytes" not in arguments:
        return ({"max_model_len": -1} if fit else {}) | arguments
    # memory that is asked for is touched: ask for what these prompts can fill
    most = arguments["kv_cache_memory_bytes"]
    arguments.setdefault("max_model_len", min(front.context, max(most // per_token - BLOCK, BLOCK)))
    longest = arguments["max_model_len"]
    together = arguments.get("max_num_seqs", len(lengths) or 1)
    if complete:
        tokens = sum(_blocks(length) for length in sorted(lengths)[-together:])
    else:
        tokens = together * _blocks(max(lengths, default=longest))
    tokens = max(min(tokens, most // per_token), _blocks(longest)) + BLOCK
    if "kv_cache_memory_bytes" not in job["set"]:
        arguments["kv_cache_memory_bytes"] = tokens * per_token
    return arguments


def _blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _bytes_per_token(front: Front) -> int | None:
    """Key and value of every layer; an upper bound where config.json leaves it open. None for a model without heads."""
    config = front.text_config
    if (heads := config.get("num_attention_heads")) is None:
        return None
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(
        2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
        * (4 if front.dtype == "float32" else 2)
    )  # fmt: skip


def _know_the_model(registry: Any, config: dict[str, Any]) -> None:
    """Import the model's class here, where it is needed anyway: vLLM would start an interpreter to look at it."""
    for architecture in config.get("architectures") or []:
        if known := registry.models.get(architecture):
            registry.register_model(architecture, known.load_model_cls())
