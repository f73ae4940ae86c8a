"""Who generates: vLLM (with its plugins) and transformers, the reference. Both run as workers.

`choose` decides which of them; `stream` runs it, `generate` and `sample` are its short forms. Nothing
heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qtool import workers
from qtool.errors import InputError
from qtool.runtimes.facts import NAMES, RUNTIMES, get, problems, read_by, readers
from qtool.runtimes.launch import Launch, adapted, choose, kind_of
from qtool.runtimes.settings import dtype, split
from qtool.runtimes.window import run


def stream(
    model: str | Path,
    requests: Iterator[dict[str, Any]],
    on_answer: Callable[[dict[str, Any]], None],
    *,
    sampling: Mapping[str, Any],
    runtime: str = "auto",
    arguments: Mapping[str, Any] = MappingProxyType({}),
    expected: int = 0,
    one_at_a_time: bool = False,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    reasoning_parser: str | None = None,
    trust_remote_code: bool = False,
    pieces: bool = False,
    ids: bool = False,
    gaps: bool = False,
    on_event: Callable[[workers.Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Answer requests as they come, in the memory of those under way. Answers come in the order of the requests.

    Args:
        model: a checkpoint folder of any format that the runtime reads.
        requests: each has an `index` (ascending) and `prompt` (a text, or token ids) or `messages`; it may have
            `sampling` and `chat_template_kwargs` of its own. One with an `error` has that for an answer.
        on_answer: gets each answer: index, and either `error`, or prompt_tokens and `choices`, each with text,
            finish_reason ("stop" or "length"), completion_tokens, and as asked for: reasoning, logprobs, gaps.
        sampling: vLLM's SamplingParams by name. Prompt i draws from seed + i.
        arguments: what `--set` says: vLLM's EngineArgs, and (in capitals) its environment variables.
        expected: how many requests there will be, as far as that is known: long jobs are worth compiling for.
        one_at_a_time: each request comes after the answer to the one before, so that vLLM needs room for one only.
        chat: the requests are conversations: a model without a chat template is an error at once.
        reasoning_parser: vLLM's name of what splits thinking from the answer, in conversations.
        pieces: tell each new piece of the first unfinished answer: an event `piece` with index and text.
        ids: answers have prompt_ids and, in each choice, token_ids (an end-of-text token included).
        gaps: choices have `gaps`, per token the logit difference between the likeliest token and the next: 0 is a tie.
        on_event: gets every other worker event.

    Returns:
        runtime, answers, tokens, and seconds by stage.

    Raises:
        InputError: a folder that is no checkpoint, no runtime for it, settings or sampling that it doesn't know.
        QtoolError: the worker failed, or died twice.
    """
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(model)
    chosen = choose(runtime, formats.of(checkpoint).name)
    check(chosen, sampling, arguments, reasoning_parser)
    chosen = adapted(chosen, checkpoint)
    engine, env = split(arguments)
    own = {"max_num_seqs": 1} if one_at_a_time and chosen.runtime.vllm else {}
    job = {
        "model": str(checkpoint.path.resolve()),
        "runtime": chosen.name,
        "dtype": engine.get("dtype") or dtype(checkpoint, kind_of(chosen.name)),
        "engine": {**chosen.engine, **own, **engine},
        "set": dict(arguments),
        "expected": expected,
        "compile_from": chosen.compile_from,
        "sampling": dict(sampling),
        "chat": chat,
        "chat_template_kwargs": dict(chat_template_kwargs),
        "reasoning_parser": reasoning_parser,
        "trust_remote_code": trust_remote_code,
        "stream": pieces,
        "ids": ids,
        "gaps": gaps,
    }

    def work(inputs: Iterator[dict[str, Any]], event: Callable[[workers.Event], None]) -> dict[str, Any]:
        env_ = {**chosen.env, **env}
        return workers.run(chosen.module, job, python=chosen.python, on_event=event, inputs=inputs, env=env_)

    return run(work, requests, on_answer, on_event)


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
    max_tokens: int | None,
    temperature: float | None = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    runtime: str = "auto",
    trust_remote_code: bool = False,
    ignore_eos: bool = False,
    gaps: bool = False,
    on_event: Callable[[workers.Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Continue each prompt; the answers come in the order of the prompts.

    Args:
        model: a checkpoint folder of any format that the runtime reads.
        prompts: texts, or lists of token ids.
        max_tokens: None for as many as the model's context has room for.
        temperature: 0 takes the likeliest token each time; None is vLLM's default, 1.
        seed: prompt i draws from seed + i, so an answer doesn't depend on its neighbours.
        ignore_eos: go on to max_tokens whatever comes.
        gaps: add `gaps`, per token the logit difference between the likeliest token and the next: 0 is a tie.
        on_event: gets every worker event.

    Returns:
        Per prompt: index, prompt (None for token ids), prompt_ids, text, token_ids (an end-of-text token included),
        finish_reason ("stop" or "length"), prompt_tokens, completion_tokens.

    Raises:
        InputError: a folder that is no checkpoint, no runtime for it, a prompt that is empty or too long.
        QtoolError: the worker failed.
    """
    answers = []
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}

    def collect(item: dict[str, Any]) -> None:
        index = item["index"]
        if "error" in item:
            raise InputError(item["error"], where=f"prompt {index + 1}")
        prompt = prompts[index]
        (choice,) = item.pop("choices")
        answers.append({**item, **choice, "prompt": prompt if isinstance(prompt, str) else None})

    stream(
        model,
        ({"index": i, "prompt": p if isinstance(p, str) else list(p)} for i, p in enumerate(prompts)),
        collect,
        sampling={name: value for name, value in sampling.items() if value is not None} | {"ignore_eos": ignore_eos},
        runtime=runtime,
        trust_remote_code=trust_remote_code,
        ids=True,
        gaps=gaps,
        on_event=on_event,
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
    on_event: Callable[[workers.Event], None] = lambda event: None,
) -> list[list[int]]:
    """`n` texts that the model itself writes, at temperature 1, each of exactly `length` token ids.

    Each starts with the beginning-of-text token; where a tokenizer has none, with a random token.

    Raises:
        InputError, QtoolError: as `generate`.
    """
    answers = generate(
        model,
        [[] for _ in range(n)],
        max_tokens=length - 1,
        temperature=1.0,
        seed=seed,
        runtime=runtime,
        trust_remote_code=trust_remote_code,
        ignore_eos=True,
        on_event=on_event,
    )
    return [answer["prompt_ids"] + answer["token_ids"] for answer in answers]


__all__ = [
    "NAMES",
    "RUNTIMES",
    "Launch",
    "check",
    "choose",
    "generate",
    "get",
    "kind_of",
    "problems",
    "read_by",
    "readers",
    "sample",
    "stream",
]
