"""Requests into vLLM's engine, answers out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qtool.errors import InputError, in_one_line
from qtool.runtimes.worker.front import Front, Prepared, failure
from qtool.runtimes.worker.meter import Meter
from qtool.runtimes.worker.reasoning import splitter
from qtool.workers import READ_AHEAD, Report

SETTLE_SECONDS = 0.2  # inputs that come one by one, further apart than this, are not waited for before the model loads
IMPOSSIBLE = -9999.0  # vLLM's server says so too, where a token can't come: JSON has no infinity
QUEUED = 2  # requests that vLLM is given, as a multiple of those it works on at a time


def refusals() -> tuple[type[Exception], ...]:
    """How vLLM says that a request or a setting is wrong; pydantic's errors are ValueErrors too."""
    try:
        from vllm.exceptions import VLLMClientError
    except ImportError:  # before 0.32 or so
        return (ValueError, TypeError, OverflowError)
    return (ValueError, TypeError, OverflowError, VLLMClientError)


class Intake:
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


class Loop:
    """Keeps vLLM's scheduler fed, and sends each answer on its way."""

    def __init__(self, engine: Any, front: Front, report: Report, meter: Meter, seqs: int | None) -> None:
        self.engine, self.front, self.report, self.meter = engine, front, report, meter
        self.window = QUEUED * (seqs or 256)
        self.running: dict[str, Prepared] = {}
        self.texts: dict[str, list[Any]] = {}
        self.split = splitter(front) if front.job.chat.reasoning_parser else None

    def run(self, first: Iterable[Prepared], intake: Intake) -> None:
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
        if self.front.job.extras.pieces and len(output.outputs) == 1:
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
        if self.front.job.extras.gaps:
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


def _parameters(front: Front, prepared: Prepared) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling = dict(prepared.sampling)
    if structured := sampling.pop("structured_outputs", None):
        sampling["structured_outputs"] = StructuredOutputsParams(**structured)
    if biases := sampling.get("logit_bias"):
        sampling["logit_bias"] = {int(token): bias for token, bias in biases.items()}  # JSON's keys are texts
    if front.job.extras.gaps:
        sampling["logprobs"] = max(2, sampling.get("logprobs") or 0)
    if front.job.chat.reasoning_parser and prepared.chat:
        sampling.setdefault("skip_special_tokens", False)
    streamed = front.job.extras.pieces and sampling.get("n", 1) == 1
    sampling |= {
        "seed": None if sampling.get("temperature") == 0 else prepared.seed,
        "stop_token_ids": prepared.stop,
        "ignore_eos": True,  # the stop ids say it all
        "output_kind": RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
    }
    return SamplingParams(**sampling)
