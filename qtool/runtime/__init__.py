"""Who generates: vLLM (with its plugins) and transformers, the reference. Both run as workers.

`choose` decides which of them, `generate` and `sample` run it. Nothing heavy is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.environments import lookup, machine
from qtool.environments.table import ENGINES
from qtool.errors import InputError
from qtool.runtime import mindspore

NAMES = ("auto", "vllm", "transformers", "vllm-mindspore", "vllm-ascend")

# checkpoint format -> the vLLM plugin that reads it; vLLM by itself reads the others
PLUGINS = {"golden-stick": "vllm-mindspore", "modelslim": "vllm-ascend"}
QUANTIZATION = {"golden-stick": "golden-stick", "modelslim": "ascend"}


@dataclass(frozen=True)
class Runtime:
    """What runs a checkpoint: a worker module, the interpreter for it, and its settings."""

    name: str
    python: str
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return f"qtool.runtime.{'transformers' if self.name == 'transformers' else 'vllm'}_worker"


def choose(runtime: str, format: str) -> Runtime:
    """The runtime for a checkpoint of this format (as `Checkpoint.format` says it).

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
        return Runtime("transformers", lookup.interpreter("transformers"), env=_environment("cpu"))
    return _vllm("vllm", {})


def generate(
    model: str | Path,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
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
        temperature: 0 takes the likeliest token each time.
        seed: prompt i draws from seed + i, so an answer doesn't depend on its neighbours.
        ignore_eos: go on to max_tokens whatever comes.
        gaps: add `gaps`, per token the logit difference between the likeliest token and the next: 0 is a tie.
        on_event: gets every worker event; an item event carries one answer, as soon as it is finished.

    Returns:
        Per prompt: index, prompt (None for token ids), text, token_ids (an end-of-text token included),
        finish_reason ("stop" or "length"), prompt_tokens, completion_tokens.

    Raises:
        InputError: a folder that is no checkpoint, no runtime for it, a prompt that is empty or too long.
        QtoolError: the worker failed.
    """
    from qtool.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(model)
    chosen = choose(runtime, checkpoint.format)
    if chosen.name == "vllm-mindspore":
        chosen = mindspore.adapt(chosen, checkpoint)
    given = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    job = {
        "model": str(checkpoint.path.resolve()),
        "prompts": given,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "ignore_eos": ignore_eos,
        "gaps": gaps,
        "runtime": chosen.name,
        "engine": chosen.engine,
    }
    answers: list[dict[str, Any] | None] = [None] * len(given)

    def collect(event: workers.Event) -> None:
        if event["event"] == "item":
            answers[event["data"]["index"]] = event["data"]
        on_event(event)

    workers.run(chosen.module, job, python=chosen.python, on_event=collect, env=chosen.env)
    return [answer for answer in answers if answer is not None]


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


def _vllm(name: str, engine: dict[str, Any]) -> Runtime:
    python, hardware = lookup.interpreter(name), _hardware(name)
    return Runtime(name, python, {**_settings(hardware)["engine"], **engine}, _environment(hardware))


def _settings(hardware: str) -> dict[str, dict[str, Any]]:
    import yaml

    from qtool import resources

    file = resources.folder("configs") / f"runtime-{hardware}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def _environment(hardware: str) -> dict[str, str]:
    """The settings' variables for the worker; those that the user has set win."""
    env = _settings(hardware)["env"]
    if hardware == "cpu":
        env = {"OMP_NUM_THREADS": str(machine.cpus()), **env}
    return {name: value for name, value in env.items() if name not in os.environ}


def _hardware(name: str) -> str:
    plugins = [ENGINES[plugin].package for plugin in PLUGINS.values()]
    if name != "vllm" or any(map(lookup.available, plugins)):
        return "ascend"
    return "cuda" if machine.has_cuda() else "cpu"


def _installed(name: str) -> bool:
    try:
        lookup.interpreter(name)
    except InputError:
        return f"QTOOL_{name.upper()}_PYTHON" in os.environ  # a wrong value is an error to show, not a reason to go on
    return True


__all__ = ["NAMES", "Runtime", "choose", "generate", "sample"]
