"""What the commands do, as functions for notebooks and scripts.

    import qtool

    made = qtool.quantize("SmolLM2-135M-Instruct")
    print(qtool.evaluate("SmolLM2-135M-Instruct", made.output).figures.kl_divergence["value"])
    for answer in qtool.generate(made.output, ["I am", "Today is"], temperature=0):
        print(answer.text)

Everything heavy runs in processes of its own, as it does for the commands; nothing heavy is imported here. Bad input
raises `qtool.InputError`; what fails while it works raises `qtool.QtoolError`.

A model is a folder, a GGUF file, or a name on a hub, such as "org/name" or "modelers:org/name@v1": what is not on this
machine is downloaded and checked, unless HF_HUB_OFFLINE=1. A `Path` is never a name on a hub.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from qtool.errors import InputError, QtoolError

if TYPE_CHECKING:
    from qtool.engines.job import Resources
    from qtool.engines.report import QuantizationResult
    from qtool.evaluation.job import Comparison
    from qtool.jobs.models import Model as Found

Event = dict[str, Any]
"""Progress, warnings and results of a worker: `event` says which; progress has stage, done, total and unit."""

OnEvent = Callable[[Event], None]
Model = str | PathLike[str]
Message = Mapping[str, Any]


def warn(event: Event) -> None:
    """Pass a worker's warnings on to Python's; silent about the rest."""
    if event["event"] == "warning":
        warnings.warn(event["message"], stacklevel=2)


def _find(model: Model, on_event: OnEvent) -> Found:
    """The model that an argument names, fetched first if need be. Raises as `jobs.models.find`."""
    from qtool.jobs.models import Access, find

    text = model if isinstance(model, str) else str(Path(model).expanduser().absolute())
    return find(text, Access(offline=False, on_event=on_event))


def quantize(
    model: Model,
    output: Model | None = None,
    *,
    recipe: str | None = None,
    scheme: str | None = None,
    format: str | None = None,
    kv_cache: Literal["fp8", "int8", "float"] | None = None,
    engine: Literal["auto", "native", "golden-stick"] = "auto",
    effort: Literal["normal", "high"] | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto",
    devices: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    resources: Resources | None = None,
    on_event: OnEvent = warn,
) -> QuantizationResult:
    """Quantize a float checkpoint, as `qtool quantize` does; None leaves a choice to the recipe.

    Args:
        model: its folder, a GGUF file or a name on a hub.
        output: the folder to make; None for MODEL-SCHEME, beside the model, or here for a name on a hub.
        recipe: a recipe's name or file; None for the one that matches the model.
        scheme: one of the recipe's.
        format: of the checkpoint.
        effort: normal, or high for a checkpoint nearer to the original in several times the time.
        kv_cache: how the runtime keeps keys and values.
        calibration: builtin, self, or a .txt, .jsonl or .parquet file.
        samples, seq_len: calibration samples, and tokens of each.
        seed: for everything random.
        devices: cards of this machine to use.
        overwrite: replace the output if it exists.
        resume: go on where an earlier run of the same job ended.
        resources: memory in bytes, processes, Ray, threads.
        on_event: hears of progress and warnings.
    """
    from qtool.engines.job import Resources
    from qtool.jobs import quantize as jobs

    found = _find(model, on_event)
    wanted = jobs.Wanted(
        output=None if output is None else Path(output),
        beside=found.beside,
        recipe=recipe,
        scheme=scheme,
        format=format,
        kv_cache=kv_cache,
        engine=engine,
        effort=effort,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        devices=devices,
        overwrite=overwrite,
        resume=resume,
        trust_remote_code=trust_remote_code,
        resources=resources or Resources(),
    )
    decided = jobs.decide(found.path, wanted)
    return jobs.run(decided.engine, decided.job, on_event)


@overload
def evaluate(
    base: Model,
    quantized: Model,
    *,
    text: str = "builtin",
    windows: int = 24,
    length: int = 512,
    runtime: Literal["qtool", "vllm"] = "qtool",
    trust_remote_code: bool = False,
    on_event: OnEvent = warn,
) -> Comparison: ...
@overload
def evaluate(
    base: Model,
    quantized: list[Model] | list[str] | list[Path],
    *,
    text: str = "builtin",
    windows: int = 24,
    length: int = 512,
    runtime: Literal["qtool", "vllm"] = "qtool",
    trust_remote_code: bool = False,
    on_event: OnEvent = warn,
) -> list[Comparison]: ...
def evaluate(
    base: Model,
    quantized: Model | list[Model] | list[str] | list[Path],
    *,
    text: str = "builtin",
    windows: int = 24,
    length: int = 512,
    runtime: Literal["qtool", "vllm"] = "qtool",
    trust_remote_code: bool = False,
    on_event: OnEvent = warn,
) -> Comparison | list[Comparison]:
    """Perplexity, KL divergence and agreement of a quantized model with its original, as `qtool eval` finds them.

    Args:
        base: the original: its folder, a GGUF file or a name on a hub.
        quantized: the quantized model, likewise; or a list of several, for which the original is computed once.
        text: what to predict: builtin, or a .txt, .jsonl or .parquet file.
        windows, length: windows of text from its start, and tokens of each.
        runtime: who runs the quantized models: qtool, layer by layer in float32, or vLLM, whole.
        on_event: hears of progress and warnings.

    Returns:
        The comparison; for a list one of each model, in its order.
    """
    from qtool.evaluation.job import EvaluationText, run
    from qtool.jobs import evaluate as jobs

    listed = quantized if isinstance(quantized, list) else [quantized]
    models = jobs.opened(*(_find(model, on_event).path for model in (base, *listed)))
    job = jobs.comparison(models, EvaluationText(text, windows, length), runtime, trust_remote_code=trust_remote_code)
    found = run(job, on_event)
    return found if isinstance(quantized, list) else found[0]


@dataclass(frozen=True)
class Choice:
    """One continuation of a prompt.

    Attributes:
        finish_reason: stop, or length where it was cut off.
        reasoning: what the model thought before it answered, where a parser splits that off.
    """

    text: str
    finish_reason: str
    completion_tokens: int
    reasoning: str | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a prompt.

    Attributes:
        index: the prompt's number, from 0.
        prompt_tokens: how many it has; 0 where it could not be answered.
        choices: continuations; more than one where `n` asks for them.
        error: why it could not be answered, if so.
    """

    index: int
    prompt_tokens: int = 0
    choices: list[Choice] = field(default_factory=list)
    error: str | None = None

    @property
    def text(self) -> str:
        """Of the first continuation. Raises InputError when the prompt could not be answered."""
        if self.error is not None:
            raise InputError(self.error, where=f"prompt {self.index + 1}")
        return self.choices[0].text


def generate(
    model: Model,
    prompts: Iterable[str | list[Message]],
    *,
    runtime: str = "auto",
    arguments: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = warn,
    **sampling: Any,
) -> Iterator[Answer]:
    """Continue texts, or answer conversations, as `qtool generate` does: one after the other, in their order.

    The prompts are taken as they are needed, so they may be a generator, and endless.

    Args:
        model: its folder, a GGUF file or a name on a hub; of any format that the runtime reads.
        prompts: texts; or lists of messages with role and content, which go through the model's chat template.
        runtime: auto, vllm, transformers, vllm-mindspore or vllm-ascend.
        arguments: vLLM's EngineArgs, and (in capitals) its environment variables.
        on_event: hears of progress and warnings, in a thread of its own.
        sampling: vLLM's SamplingParams by name, such as max_tokens, temperature and seed. What is not said is the
            recipe's, then the model's own.

    Raises InputError and QtoolError with the first answer that is asked for.
    """
    from qtool import runtimes
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes import sampling as words

    checkpoint = Checkpoint.open(_find(model, on_event).path)
    asked = words.validated(sampling)
    launch = runtimes.choose(runtime, formats.of(checkpoint).name)
    runtimes.check(launch, asked, arguments or {})
    job = runtimes.GenerationJob(
        model=str(checkpoint.path),
        sampling=launch.runtime.possible(
            words.merged({"seed": 0}, words.of_model(checkpoint), words.of_recipe(checkpoint).given(), asked)
        ),
        runtime=launch.name,
        arguments=arguments or {},
        trust_remote_code=trust_remote_code,
    )

    def requests() -> Iterator[Event]:
        for index, prompt in enumerate(prompts):
            yield {"index": index, **({"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)})}

    return _iterate(lambda take: runtimes.stream(job, requests(), take, on_event))


class _Closed(Exception):
    """Nobody wants further answers."""


def _iterate(stream: Callable[[Callable[[Event], None]], object]) -> Iterator[Answer]:
    """What `stream` gives to its callback, which runs in a thread and waits until each answer has been taken."""
    answers: queue.Queue[Answer | BaseException | None] = queue.Queue(1)
    closed = threading.Event()

    def take(item: Event) -> None:
        choices = [
            Choice(each["text"], each["finish_reason"], each["completion_tokens"], each.get("reasoning"))
            for each in item.get("choices", ())
        ]
        put(Answer(item["index"], item.get("prompt_tokens", 0), choices, item.get("error")))

    def put(value: Answer | BaseException | None) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                answers.put(value, timeout=0.1)
                return
        raise _Closed

    def work() -> None:
        with suppress(_Closed):
            try:
                stream(take)
                put(None)
            except _Closed:
                raise
            except BaseException as error:
                put(error)

    thread = threading.Thread(target=work, name="qtool.generate", daemon=True)
    thread.start()
    try:
        while (value := answers.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        closed.set()


def convert(
    source: Model,
    to: str = "safetensors",
    output: Model | None = None,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    scheme: str | None = None,
    overwrite: bool = False,
    on_event: OnEvent = warn,
) -> Path:
    """Another format of a quantized checkpoint, or a checkpoint of a GGUF file, as `qtool convert` makes them.

    Args:
        source: a quantized model: its folder or a name on a hub; or a GGUF file.
        to: a format; `bfloat16` dequantizes. A GGUF file becomes `safetensors`.
        output: the folder to make; None for one beside the source, or here for a name on a hub.
        dtype: of the parameters, for a GGUF file.
        scheme: fp8-dynamic or fp8-block, to round a quantized model again; `to` is compressed-tensors then.

    Returns:
        The folder.
    """
    from qtool import conversion as service
    from qtool.checkpoint.reader import Checkpoint

    path = Path(source).expanduser().absolute()
    if path.suffix == ".gguf" and not path.is_dir():
        if scheme is not None:
            raise InputError("a GGUF file can't be rounded at once", where=str(path), hint="quantize it afterwards")
        if to != "safetensors":
            raise InputError(f"a GGUF file can't become {to} at once", where=str(path), hint="quantize it afterwards")
        target = service.beside(path, None) if output is None else Path(output).expanduser()
        service.from_gguf(path, target, dtype, overwrite=overwrite, on_event=on_event)
    else:
        if scheme is not None:
            to, scheme = service.for_scheme(to, scheme)
        found = _find(source, on_event)
        path = Checkpoint.open(found.path).path
        target = service.beside(found.beside, scheme or to) if output is None else Path(output).expanduser()
        service.to_format(path, target, to, overwrite=overwrite, on_event=on_event, scheme=scheme)
    return target.absolute()


def inspect(model: Model, *, on_event: OnEvent = warn) -> dict[str, Any]:
    """What a checkpoint is, from its headers and config.json alone: what `qtool inspect --json` prints.

    Args:
        model: its folder, a GGUF file or a name on a hub.
        on_event: hears of the progress of a download, and of warnings.
    """
    from qtool.checkpoint.reader import Checkpoint
    from qtool.checkpoint.summary import summarize
    from qtool.runtimes.table import as_it_is

    checkpoint = Checkpoint.open(_find(model, on_event).path)
    return summarize(checkpoint) | {"runtimes": [asdict(way) for way in as_it_is(checkpoint)]}


def download(
    name: str,
    to: Model | None = None,
    *,
    hub: Literal["auto", "huggingface", "modelers"] = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    on_event: OnEvent = warn,
) -> Path:
    """A model from a hub, complete and checked, as `qtool download` gets it.

    Args:
        name: ORG/NAME, or a recipe that names a model.
        to: the folder to make; None for NAME, in the current folder.
        revision: branch, tag or commit.
        overwrite: replace the folder if it holds something else.

    Returns:
        The folder.
    """
    from qtool.jobs import download as jobs

    place = jobs.find(name, hub, revision)
    target = jobs.folder(place, None if to is None else Path(to))
    jobs.run(place, target, overwrite=overwrite, on_event=on_event)
    return target


__all__ = [
    "Answer",
    "Choice",
    "Event",
    "InputError",
    "QtoolError",
    "convert",
    "download",
    "evaluate",
    "generate",
    "inspect",
    "quantize",
]
