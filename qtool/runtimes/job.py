"""What is asked of a runtime, and what its worker gets of it: typed here and there, JSON in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How conversations are put to the model.

    Attributes:
        required: the requests are conversations: a model without a chat template is an error at once.
        template_kwargs: further values for the chat template; a request's own come before them.
        reasoning_parser: vLLM's name of what splits thinking from the answer.
    """

    required: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_parser: str | None = None


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What an answer says besides its text.

    Attributes:
        ids: answers have `prompt_ids` and, in each choice, `token_ids` (an end-of-text token included).
        gaps: choices have `gaps`, per token the logit difference between the likeliest token and the next: 0 is a tie.
        pieces: each new piece of the first unfinished answer is told: an event `piece` with index and text.
    """

    ids: bool = False
    gaps: bool = False
    pieces: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """What is asked of a runtime.

    Attributes:
        model: a checkpoint folder of any format that the runtime reads.
        sampling: vLLM's SamplingParams by name. Prompt i draws from seed + i.
        runtime: a name, or auto.
        arguments: what `--set` says: vLLM's EngineArgs, and (in capitals) its environment variables.
        expected: how many requests there will be, as far as that is known: long jobs are worth compiling for.
        one_at_a_time: each request comes after the answer to the one before, so that vLLM needs room for one only.
        trust_remote_code: the model's own Python code may run.
    """

    model: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    runtime: str = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    chat: ChatSettings = ChatSettings()
    extras: Extras = Extras()
    expected: int = 0
    one_at_a_time: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerJob(GenerationJob):
    """The same with what has been decided: `runtime` is a runtime's name, `model` an absolute path.

    Attributes:
        dtype: the name of the dtype in which the runtime computes.
        engine: vLLM's EngineArgs: the machine's settings, and what the user says over them.
        compile_from: new tokens that make it worth while to compile the model; None where nothing is known.
    """

    dtype: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    compile_from: int | None = None

    @classmethod
    def of(cls, job: GenerationJob, **decided: Any) -> Self:
        """`job` with what has been decided about it: fields by their names."""
        return cls(**{each.name: getattr(job, each.name) for each in fields(job)} | decided)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**data, "chat": ChatSettings(**data["chat"]), "extras": Extras(**data["extras"])})
