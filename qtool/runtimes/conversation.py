"""A conversation with a model: a worker that stays, and one question after the other."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qtool import workers
from qtool.errors import QtoolError
from qtool.runtimes.generation import OnEvent, stream
from qtool.runtimes.job import GenerationJob

_Message = tuple[str, Any]  # what kind of message, and what it says


class Refused(QtoolError):
    """A question that can't be answered, such as one that the model's context has no room for."""


@dataclass(frozen=True)
class Told:
    """What is known of an answer once it is complete.

    Attributes:
        tokens: how many it has.
        per_second: how fast they came after the first; None for fewer than two.
        finish_reason: stop, or length where it was cut off, or abort.
    """

    tokens: int
    per_second: float | None
    finish_reason: str


class Conversation:
    """Runs `stream` in a thread. `messages` is what has been said, as a chat template wants it.

    Attributes:
        told: of the last answer.

    Args:
        job: what is asked; that its requests are a conversation, one at a time, is said here.
        system: what the system says first.
        on_event: gets the worker's events other than the text, in the thread that asks.
    """

    def __init__(self, job: GenerationJob, *, system: str | None, on_event: OnEvent) -> None:
        self._system = system
        self._on_event = on_event
        # Simple queues: `stop` may be called by a signal's handler, in the middle of another call.
        self._asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._index = -1
        self.told: Told | None = None
        self.reset()
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forget what has been said."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def ready(self) -> None:
        """Wait until the model is loaded. Raises QtoolError: it can't be."""
        while True:
            kind, said = self._heard.get()
            if kind == "failure":
                raise said
            if kind == "event":
                self._on_event(said)
                if said.get("stage") == "generate":
                    return

    def ask(self, text: str) -> None:
        """Say something; `listen` gives the answer."""
        self._began: float | None = None
        self._question = {"role": "user", "content": text}
        self._index += 1
        self._asked.put({"index": self._index, "messages": [*self.messages, self._question]})

    def listen(self) -> str | None:
        """The next piece of the answer, or None when it is complete; it is remembered then, with the question.

        Raises:
            Refused: this question can't be answered; it is forgotten.
            QtoolError: the runtime failed, and the conversation is over.
        """
        while True:
            kind, said = self._heard.get()
            if kind == "piece":
                self._ended = time.monotonic()
                self._began = self._began or self._ended
                return str(said)
            if kind == "failure":
                raise said
            if kind == "event":
                self._on_event(said)
            elif "error" in said:
                raise Refused(said["error"], hint="/reset forgets what was said before.")
            else:
                choice = said["choices"][0]
                self.told = self._measured(choice)
                self.messages += [self._question, {"role": "assistant", "content": choice["text"]}]
                return None

    def _measured(self, choice: dict[str, Any]) -> Told:
        tokens = choice["completion_tokens"]
        seconds = self._ended - self._began if self._began is not None else 0.0
        return Told(tokens, (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None, choice["finish_reason"])

    def stop(self) -> None:
        """Have the answer end where it is, if it has not ended yet. A signal's handler may call it."""
        self._asked.put({"index": self._index, "abort": True})

    def close(self) -> None:
        """No more questions: the worker ends."""
        self._asked.put({})
        self._thread.join()

    def _run(self, job: GenerationJob) -> None:
        def requests() -> Iterator[dict[str, Any]]:
            while request := self._asked.get():
                yield request

        def event(event: workers.Event) -> None:
            kind, said = ("piece", event["text"]) if event["event"] == "piece" else ("event", event)
            self._heard.put((kind, said))

        try:
            job = replace(
                job,
                one_at_a_time=True,
                chat=replace(job.chat, required=True),
                extras=replace(job.extras, pieces=True),
            )
            stream(job, requests(), lambda item: self._heard.put(("answer", item)), event)
        except BaseException as error:
            self._heard.put(("failure", error))
