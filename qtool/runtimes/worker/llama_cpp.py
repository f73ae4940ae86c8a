"""llama.cpp as a runtime: its server's loop inside this process, with token ids in and out.

The tokenizer, the template, the context and the stop tokens are the checkpoint's own, as in the other runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

from qtool.checkpoint import config as claims
from qtool.environments import machine
from qtool.errors import InputError, QtoolError, foreign
from qtool.runtimes.job import WorkerJob
from qtool.runtimes.worker.front import Front, Prepared, failure
from qtool.runtimes.worker.gguf_file import make
from qtool.runtimes.worker.meter import Meter
from qtool.workers import Report, hide_media_packages

_SLOTS = 8  # answers at a time, at most
_KEPT = 4  # one part in so many of the free memory is for keys and values


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Answer `report.inputs` as `qtool.runtimes.stream` says. `job` is a `WorkerJob`, the result a `Generated`."""
    meter = Meter(report)
    report.progress("load the model", 0, 0)
    hide_media_packages()
    front = Front(WorkerJob.from_json(job), report)
    import xllamacpp

    meter.lap("import")
    file = Path(front.job.engine["file"])
    if not file.exists():
        make(Path(front.job.model), file, report)
        meter.lap("convert")
    slots = 1 if front.job.one_at_a_time else max(1, min(_SLOTS, front.job.expected or _SLOTS))
    front.limit(_context(front, slots))
    with foreign("llama.cpp can't load this model", where=front.job.model):
        server = xllamacpp.Server(_parameters(xllamacpp, file, slots, front.context))
    meter.lap("load")
    meter.begin()
    _answer_all(server, front, slots, meter)
    front.warn()
    return meter.end("llama-cpp")


def _context(front: Front, slots: int) -> int:
    """Tokens that a prompt and its answer may have, so that the keys and values of all slots fit into memory."""
    token = 2 * (claims.kept_per_token(front.config) or 1)  # in float16
    memory = machine.memory()
    room = memory["available_bytes"] // _KEPT if memory else 1 << 30
    return max(256, min(front.context, room // token // slots) // 256 * 256)


def _parameters(xllamacpp: Any, file: Path, slots: int, context: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context
    parameters.cpuparams.n_threads = machine.cpus()
    parameters.cpuparams_batch.n_threads = machine.cpus()
    parameters.warmup = False
    parameters.verbosity = 0
    return parameters


def _answer_all(server: Any, front: Front, slots: int, meter: Meter) -> None:
    inputs, free = front.report.inputs, Semaphore(slots)
    with ThreadPoolExecutor(slots) as pool:
        running: list[Future[None]] = []
        while not inputs.ended:
            free.acquire()
            if (request := inputs.take(None)) is None:
                break
            task = pool.submit(_answer, server, front, request, meter)
            task.add_done_callback(lambda _: free.release())
            running.append(task)
            while running and running[0].done():
                running.pop(0).result()  # what has failed would fail for all
        for task in running:
            task.result()


def _answer(server: Any, front: Front, request: Mapping[str, Any], meter: Meter) -> None:
    try:
        prepared = front.prepare(request)
    except InputError as error:
        front.report.item(failure(request["index"], error))
        return
    answer = _Answer(front, prepared)
    refused = server.handle_completions(_request(prepared, front), answer.heard)
    if (fault := refused or answer.error) is not None:
        raise QtoolError(f"llama.cpp failed: {str(fault)[:200]}", where=front.job.model)
    meter.add(len(answer.tokens))
    front.report.item(front.answer(prepared, [answer.choice()]))


class _Answer:
    """One answer as it grows. `heard` gets the pieces; it returns True when no more are wanted."""

    def __init__(self, front: Front, prepared: Prepared) -> None:
        self.front, self.prepared = front, prepared
        self.tokens: list[int] = []
        self.gaps: list[float] = []
        self.reason = "length"
        self.error: object = None
        self._text = ""

    def heard(self, piece: dict[str, Any] | None) -> bool:
        if piece is None:
            return False
        if "error" in piece:
            self.error = piece["error"]
            return True
        for choice in piece.get("choices", ()):
            for place in (choice.get("logprobs") or {}).get("content", ()):
                self.tokens.append(place["id"])
                best = place["top_logprobs"]
                self.gaps.append(best[0]["logprob"] - best[1]["logprob"] if len(best) > 1 else 0.0)
                if place["id"] in self.prepared.stop:
                    self.reason = "stop"
                    return True
            self._show(choice.get("text", ""))
            if choice.get("finish_reason"):
                self.reason = choice["finish_reason"]
        if self.prepared.index in self.front.report.inputs.aborted:
            self.reason = "abort"
            return True
        return False

    def choice(self) -> dict[str, Any]:
        choice = {
            "text": self._text,
            "token_ids": self.tokens,
            "finish_reason": self.reason,
            "completion_tokens": len(self.tokens),
        }
        return choice | ({"gaps": self.gaps} if self.front.job.extras.gaps else {})

    def _show(self, text: str) -> None:
        self._text += text
        if text and self.front.job.extras.pieces:
            self.front.report.send(event="piece", index=self.prepared.index, text=text)


def _request(prepared: Prepared, front: Front) -> dict[str, Any]:
    """llama.cpp's words for it; what nobody asks for is off, where llama.cpp has defaults of its own."""
    sampling = prepared.sampling
    return {
        "prompt": prepared.ids,
        "stream": True,
        "n_probs": 2 if front.job.extras.gaps else 1,  # which also tells the token's id
        "n_predict": prepared.budget,
        "temperature": sampling.get("temperature", 1.0),
        "top_k": max(0, sampling.get("top_k", 0)),
        "top_p": sampling.get("top_p", 1.0),
        "min_p": sampling.get("min_p", 0.0),
        "repeat_penalty": sampling.get("repetition_penalty", 1.0),
        "repeat_last_n": front.context,
        "presence_penalty": sampling.get("presence_penalty", 0.0),
        "frequency_penalty": sampling.get("frequency_penalty", 0.0),
        "seed": prepared.seed % (1 << 32),
        "stop": list(sampling.get("stop") or ()),
        "ignore_eos": bool(sampling.get("ignore_eos")),
        "cache_prompt": False,
    }
