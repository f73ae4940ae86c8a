"""Who generates: vLLM (with its plugins) and transformers, the reference. Both run as workers.

`choose` decides which of them; `stream` runs it, `generate` and `sample` are its short forms. Nothing
heavy is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qtool import workers
from qtool.environments import lookup
from qtool.errors import InputError
from qtool.runtimes import mindspore, settings
from qtool.runtimes.settings import TRANSFORMERS_SAMPLING, dtype, environment, hardware, preload, split
from qtool.runtimes.window import run

NAMES = ("auto", "vllm", "transformers", "vllm-mindspore", "vllm-ascend")

# checkpoint format -> the vLLM plugin that reads it; vLLM by itself reads the others
PLUGINS = {"golden-stick": "vllm-mindspore", "modelslim": "vllm-ascend"}
QUANTIZATION = {"golden-stick": "golden-stick", "modelslim": "ascend"}


@dataclass(frozen=True)
class Runtime:
    """What runs a checkpoint: a worker module, the interpreter for it, and its settings.

    Args:
        engine: vLLM's EngineArgs.
        env: variables for the worker.
        compile_from: new tokens that make it worth while to compile the model; None where nothing is known.
    """

    name: str
    python: str
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    compile_from: int | None = None

    @property
    def module(self) -> str:
        return f"qtool.runtimes.{'transformers' if self.name == 'transformers' else 'vllm'}_worker"


def choose(runtime: str, format: str) -> Runtime:
    """The runtime for a checkpoint of this format (as `formats.of` names it).

    `auto` takes vLLM where it is installed, else transformers. golden-stick and modelslim checkpoints
    have one runtime each, a vLLM plugin, which `vllm` stands for as well; a plugin reads float checkpoints too.

    Raises:
        InputError: an unknown runtime, one that can't read the format, or one that isn't installed.
    """
    if runtime not in NAMES:
        raise InputError(f"unknown runtime {runtime!r}", where="--runtime", hint=f"One of {', '.join(NAMES)}.")
    if plugin := PLUGINS.get(format):
        if runtime not in ("auto", "vllm", plugin):
            hint = f"Use --runtime {plugin}, or quantize with --format compressed-tensors."
            raise InputError(f"{runtime} can't read {format} checkpoints", where="--runtime", hint=hint)
        return _vllm(plugin, {"quantization": QUANTIZATION[format]})
    if runtime in PLUGINS.values():
        if format != "float":
            own = next(name for name, plugin in PLUGINS.items() if plugin == runtime)
            hint = f"Use --runtime vllm, or quantize with --format {own}."
            raise InputError(f"{runtime} can't read {format} checkpoints", where="--runtime", hint=hint)
        return _vllm(runtime, {})
    if runtime == "transformers" or (runtime == "auto" and not _installed("vllm")):
        return Runtime("transformers", lookup.interpreter("transformers"), env=environment("cpu"))
    return _vllm("vllm", {})


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
    if chosen.name == "vllm-mindspore":
        chosen = mindspore.adapt(chosen, checkpoint)
    engine, env = split(arguments)
    own = {"max_num_seqs": 1} if one_at_a_time and chosen.name != "transformers" else {}
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
    runtime: Runtime, sampling: Mapping[str, Any], arguments: Mapping[str, Any], reasoning_parser: str | None = None
) -> None:
    """That the runtime can do what is asked of it, as far as can be said without starting it.

    Raises:
        InputError: it can't.
    """
    if runtime.name != "transformers":
        return
    hint = "Use --runtime vllm."
    if unknown := sorted(sampling.keys() - TRANSFORMERS_SAMPLING):
        raise InputError(f"transformers as a runtime can't do {', '.join(unknown)}", where="--runtime", hint=hint)
    if arguments or reasoning_parser:
        what = "--set" if arguments else "--reasoning-parser"
        raise InputError(f"{what} is for vLLM", where="--runtime transformers", hint=hint)


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


def kind_of(runtime: str) -> str:
    """cpu, cuda or ascend: where a runtime of this name would run."""
    return "cpu" if runtime == "transformers" else hardware(runtime, PLUGINS.values())


def _vllm(name: str, engine: dict[str, Any]) -> Runtime:
    python, kind = lookup.interpreter(name), kind_of(name)
    env = {**environment(kind), **preload(kind, python)}
    arguments = {**settings.engine(kind), **engine}
    return Runtime(name, python, arguments, env, settings.settings(kind).get("compile_from_tokens"))


def _installed(name: str) -> bool:
    try:
        lookup.interpreter(name)
    except InputError:
        return f"QTOOL_{name.upper()}_PYTHON" in os.environ  # a wrong value is an error to show, not a reason to go on
    return True


__all__ = ["NAMES", "Runtime", "check", "choose", "generate", "sample", "stream"]
