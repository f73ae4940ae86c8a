"""Which runtime runs a checkpoint, in which interpreter and with which settings."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtool.environments import lookup, machine
from qtool.environments.settings import variable
from qtool.environments.table import ENGINES
from qtool.errors import InputError
from qtool.runtimes import facts, settings
from qtool.runtimes.description import Hardware, Quantized, Reads, Runtime

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.recipe.schema import Generate


@dataclass(frozen=True)
class Launch:
    """A runtime, about to be started.

    Attributes:
        name: the runtime's.
        python: the interpreter that has it.
        engine: vLLM's EngineArgs.
        env: variables for the worker.
        compile_from: new tokens that make it worth while to compile the model; None where nothing is known.
        otherwise: what of the checkpoint is computed in another way than it says, in one sentence; None for nothing.
    """

    name: str
    python: str
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    compile_from: int | None = None
    otherwise: str | None = None

    @property
    def runtime(self) -> Runtime:
        return facts.get(self.name)

    @property
    def hardware(self) -> Hardware:
        """Where it runs."""
        return kind_of(self.name)


def choose(runtime: str, format: str, *, serving: bool = False) -> Launch:
    """The runtime for a checkpoint of this format (as `formats.of` names it).

    `auto` takes the first that is installed of those that read the format; a plugin of vLLM's only where nothing else
    does. vLLM's name stands for its plugins as well.

    Args:
        serving: `auto` takes only a runtime that has a server.

    Raises:
        InputError: an unknown runtime, one that can't read the format, or one that isn't installed.
    """
    chosen = _auto(format, serving=serving) if runtime == "auto" else _named(facts.get(runtime), format)
    return _launch(chosen, chosen.reading(format) or Reads(format))


def kind_of(name: str) -> Hardware:
    """cpu, cuda or ascend: where the runtime of this name would run."""
    runtime = facts.get(name)
    if len(runtime.hardware) == 1:
        return runtime.hardware[0]
    for plugin in facts.RUNTIMES:
        if plugin.plugin_of == name and lookup.available(ENGINES[plugin.name].package):
            return plugin.hardware[0]
    return "cuda" if machine.has_cuda() else "cpu"


def adapted(launch: Launch, checkpoint: Checkpoint) -> Launch:
    """The launch with what one checkpoint needs: its recipe's cards, and what the runtime must be told besides.

    Raises:
        InputError: the runtime doesn't run this model.
    """
    _check(launch.runtime, checkpoint)
    engine = {**launch.engine, **_cards(launch, checkpoint)}
    return launch.runtime.adapt(dataclasses.replace(launch, engine=engine), checkpoint)


def _check(runtime: Runtime, checkpoint: Checkpoint) -> None:
    """Raises InputError where the runtime is known not to load this checkpoint, or to load noise."""
    from qtool.checkpoint import formats
    from qtool.checkpoint.summary import float_dtype, kept_cache, schemes

    found = schemes(checkpoint)
    quantized = {name for name, scheme in found.items() if scheme is not None}
    model = Quantized(checkpoint.config, found, float_dtype(checkpoint, quantized), kept_cache(checkpoint))
    for limitation in runtime.limitations(formats.of(checkpoint).name, model):
        if limitation.refuses:
            raise InputError(limitation.text, where=str(checkpoint.path), hint=limitation.hint)


def recipe_of(checkpoint: Checkpoint) -> Generate:
    """How a checkpoint's recipe has it run: the recipe in its qtool.json, else the one that fits it."""
    from qtool.checkpoint.reader import REPORT
    from qtool.files import read_json
    from qtool.recipe.schema import Generate
    from qtool.runtimes.sampling import of_recipe

    report = checkpoint.path / REPORT
    recipe = read_json(report).get("recipe") if report.exists() else None
    return Generate.model_validate(recipe.get("generate") or {}) if recipe else of_recipe(checkpoint)


def _auto(format: str, *, serving: bool) -> Runtime:
    readers = [runtime for runtime in facts.readers(format) if runtime.server is not None or not serving]
    if not readers:
        hint = "Convert it to another format first: qtool convert."
        raise InputError(f"no runtime serves {format} checkpoints", where="--runtime", hint=hint)
    candidates = [runtime for runtime in readers if runtime.plugin_of is None] or readers
    return next((runtime for runtime in candidates if _installed(runtime.name)), candidates[-1])


def _named(wanted: Runtime, format: str) -> Runtime:
    readers = facts.readers(format)
    if wanted in readers or (wanted.by_conversion and wanted.reading(format)):
        return wanted
    for plugin in readers:
        if plugin.plugin_of == wanted.name:
            return plugin
    own = next(reads.format for reads in wanted.reads if reads.format != "float")
    hint = f"Use --runtime {readers[0].name}, or quantize with --format {own}."
    raise InputError(f"{wanted.name} can't read {format} checkpoints", where="--runtime", hint=hint)


def _launch(runtime: Runtime, reads: Reads) -> Launch:
    python, kind = lookup.interpreter(runtime.name), kind_of(runtime.name)
    env = settings.environment(kind)
    if not runtime.vllm:
        return Launch(runtime.name, python, env=env)
    env = {**env, **settings.preload(kind, python)}
    engine = {**settings.engine(kind), **reads.engine}
    return Launch(runtime.name, python, engine, env, settings.settings(kind).get("compile_from_tokens"))


def _installed(name: str) -> bool:
    try:
        lookup.interpreter(name)
    except InputError:
        return variable(name) in os.environ  # a wrong value is an error to show, not a reason to go on
    return True


def _visible() -> int:
    """How many GPUs there are for this process; 0 where nobody knows."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in named.split(",") if device.strip()])
    return int((machine.cuda() or {}).get("devices") or 0)


def _cards(launch: Launch, checkpoint: Checkpoint) -> dict[str, Any]:
    """Over how many cards the model's recipe has it run, and what connects them: the recipe in its qtool.json, else the
    one that fits it.

    In one host no more than there are, where that is known: the most that share the model evenly.
    """
    kind = launch.hardware
    if not launch.runtime.vllm or kind == "cpu":
        return {}
    wanted = recipe_of(checkpoint)
    cards, executor = wanted.tensor_parallel_size, wanted.distributed_executor
    if kind == "cuda" and executor == "mp":
        there = _visible()
        cards = next(count for count in range(min(cards, there), 0, -1) if cards % count == 0) if there else cards
    return {} if cards == 1 else {"tensor_parallel_size": cards, "distributed_executor_backend": executor}
