"""Text from a checkpoint: a worker of its runtime answers requests as they come. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.errors import InputError
from qtool.runtimes import window
from qtool.runtimes.arguments import split
from qtool.runtimes.job import Extras, GenerationJob, WorkerJob
from qtool.runtimes.launch import Launch, adapted, choose, kind_of
from qtool.runtimes.settings import dtype

OnEvent = Callable[[workers.Event], None]


@dataclass(frozen=True)
class Generated:
    """What a job came to.

    Attributes:
        runtime: the name of the one that did it.
        answers, tokens: how many, errors not counted.
        seconds: by stage; `generate` is the last one.
    """

    runtime: str
    answers: int
    tokens: int
    seconds: Mapping[str, float]


def _unheard(event: workers.Event) -> None:
    pass


def stream(
    job: GenerationJob,
    requests: Iterator[dict[str, Any]],
    on_answer: Callable[[dict[str, Any]], None],
    on_event: OnEvent = _unheard,
) -> Generated:
    """Answer requests as they come, in the memory of those under way. Answers come in the order of the requests.

    Args:
        requests: each has an `index` (ascending) and `prompt` (a text, or token ids) or `messages`; it may have
            `sampling` and `chat_template_kwargs` of its own. One with an `error` has that for an answer.
        on_answer: gets each answer: index, and either `error`, or prompt_tokens and `choices`, each with text,
            finish_reason ("stop" or "length"), completion_tokens, and as asked for: reasoning, logprobs, gaps.
        on_event: gets every other worker event.

    Raises:
        InputError: a folder that is no checkpoint, no runtime for it, settings or sampling that it doesn't know.
        QtoolError: the worker failed, or died twice.
    """
    launch, decided = prepare(job)
    worker = launch.runtime.worker
    assert worker is not None  # `choose` takes none that qtool doesn't start
    if launch.otherwise is not None:
        on_event({"event": "warning", "message": launch.otherwise})

    def work(inputs: Iterator[dict[str, Any]], event: OnEvent) -> dict[str, Any]:
        return workers.run(
            worker,
            decided.to_json(),
            python=launch.python,
            on_event=event,
            inputs=inputs,
            env=launch.env,
        )

    return Generated(**window.run(work, requests, on_answer, on_event))


def prepare(job: GenerationJob) -> tuple[Launch, WorkerJob]:
    """Who does a job, and what its worker gets.

    Raises:
        InputError: a folder that is no checkpoint, no runtime for it, settings or sampling that it doesn't know.
    """
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(job.model)
    checkpoint.check_claims()
    launch = choose(job.runtime, formats.of(checkpoint).name)
    check(launch, job.sampling, job.arguments, job.chat.reasoning_parser)
    launch = adapted(launch, checkpoint)
    given, variables = split(job.arguments)
    alone = {"max_num_seqs": 1} if job.one_at_a_time and launch.runtime.vllm else {}
    decided = WorkerJob.of(
        job,
        model=str(checkpoint.path.resolve()),
        runtime=launch.name,
        dtype=dtype(checkpoint, kind_of(launch.name), given),
        engine={**launch.engine, **alone, **given},
        compile_from=launch.compile_from,
    )
    return replace(launch, env={**launch.env, **variables}), decided


def check(
    launch: Launch, sampling: Mapping[str, Any], arguments: Mapping[str, Any], reasoning_parser: str | None = None
) -> None:
    """That the runtime can do what is asked of it, as far as can be said without starting it.

    Raises:
        InputError: it can't.
    """
    runtime, hint = launch.runtime, "Use --runtime vllm."
    if runtime.sampling is not None and (unknown := sorted(sampling.keys() - runtime.sampling)):
        raise InputError(f"{runtime.name} as a runtime can't do {', '.join(unknown)}", where="--runtime", hint=hint)
    if not runtime.vllm and (arguments or reasoning_parser):
        what = "--set" if arguments else "--reasoning-parser"
        raise InputError(f"{what} is for vLLM", where=f"--runtime {runtime.name}", hint=hint)


def generate(
    model: str | Path,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    runtime: str = "auto",
    trust_remote_code: bool = False,
    gaps: bool = False,
    on_event: OnEvent = _unheard,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Continue each prompt; the answers come in the order of the prompts.

    Args:
        model: a checkpoint folder of any format that the runtime reads.
        prompts: texts, or lists of token ids.
        gaps: add `gaps`, per token the logit difference between the likeliest token and the next: 0 is a tie.
        on_event: gets every worker event.
        sampling: vLLM's SamplingParams by name. Without `temperature` it is 0, which takes the likeliest token each
            time; None is vLLM's default. Prompt i draws from `seed` (without it, 0) + i, so an answer doesn't depend on
            its neighbours. Without `max_tokens` there are as many as the model's context has room for.

    Returns:
        Per prompt: index, prompt (None for token ids), prompt_ids, text, token_ids (an end-of-text token included),
        finish_reason ("stop" or "length"), prompt_tokens, completion_tokens.

    Raises:
        InputError: a folder that is no checkpoint, no runtime for it, sampling that makes no sense, a prompt that is
            empty or too long.
        QtoolError: the worker failed.
    """
    from qtool.runtimes.sampling import validated

    answers = []
    asked = validated({"temperature": 0.0, "seed": 0} | sampling)

    def collect(item: dict[str, Any]) -> None:
        index = item["index"]
        if "error" in item:
            raise InputError(item["error"], where=f"prompt {index + 1}")
        prompt = prompts[index]
        (choice,) = item.pop("choices")
        answers.append({**item, **choice, "prompt": prompt if isinstance(prompt, str) else None})

    stream(
        GenerationJob(
            model=str(model),
            sampling=asked,
            runtime=runtime,
            extras=Extras(ids=True, gaps=gaps),
            trust_remote_code=trust_remote_code,
        ),
        ({"index": i, "prompt": p if isinstance(p, str) else list(p)} for i, p in enumerate(prompts)),
        collect,
        on_event,
    )
    return answers


def sample(
    model: str | Path,
    n: int,
    length: int,
    seed: int = 0,
    *,
    runtime: str = "auto",
    trust_remote_code: bool = False,
    on_event: OnEvent = _unheard,
) -> list[list[int]]:
    """`n` texts that the model itself writes, at temperature 1, each of exactly `length` token ids.

    Each starts with the beginning-of-text token; where a tokenizer has none, with a random token.

    Raises:
        InputError, QtoolError: as `generate`.
    """
    answers = generate(
        model,
        [[] for _ in range(n)],
        runtime=runtime,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
        max_tokens=length - 1,
        temperature=1.0,
        seed=seed,
        ignore_eos=True,
    )
    return [answer["prompt_ids"] + answer["token_ids"] for answer in answers]
