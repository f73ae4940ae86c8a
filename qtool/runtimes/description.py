"""What is known of a runtime before it is started: what it reads, where it runs, how it starts. Nothing is heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.errors import InputError
    from qtool.runtimes.launch import Launch

DECODING = frozenset(
    {
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop_token_ids",
        "ignore_eos",
    }
)
"""What of vLLM's SamplingParams every way of decoding can do."""

Hardware = Literal["cpu", "cuda", "ascend"]
Checked = Literal["run", "read", "not"]


@dataclass(frozen=True)
class Quantized:
    """What of a quantized model decides whether a runtime reads it.

    Attributes:
        config: its config.json.
        schemes: every linear layer's scheme by its name without ".weight"; None where it stays float.
        dtype: safetensors code of its float tensors; None where nobody knows.
        cache: how keys and values are kept, by its name in `qtool.scheme.CACHES`; "unknown" for a way that qtool can't
            read, None for floats.
    """

    config: Mapping[str, Any]
    schemes: Mapping[str, Scheme | None]
    dtype: str | None = None
    cache: str | None = None

    @property
    def architecture(self) -> str:
        return architecture(self.config)

    @property
    def static(self) -> list[str]:
        """Layers whose input scale is from calibration."""
        return [name for name, scheme in self.schemes.items() if scheme is not None and scheme.is_static]

    @property
    def dynamic(self) -> list[str]:
        """Layers whose input scale is found at run time."""
        return [
            name
            for name, scheme in self.schemes.items()
            if scheme is not None and scheme.activations is not None and scheme.activations.dynamic
        ]


def architecture(config: Mapping[str, Any]) -> str:
    """The name of the model's class in config.json; empty where none is named."""
    return str((config.get("architectures") or [""])[0])


@dataclass(frozen=True)
class Limitation:
    """One sentence about what a runtime makes of a model.

    Attributes:
        fatal: such a checkpoint must not be made: it would load as noise, or no version of the runtime can read it.
        unread: the known version doesn't read this model so; another model, or another version, may be read.
        hint: what to do about it.
        on: the hardware that it holds on; None for all.
    """

    text: str
    fatal: bool = False
    unread: bool = False
    hint: str | None = None
    on: Hardware | None = None

    @property
    def refuses(self) -> bool:
        """Whether the runtime, as it is known, can't run such a checkpoint."""
        return self.fatal or self.unread

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Limit:
    """Something that a runtime doesn't read of a format, or under a condition only.

    Attributes:
        why: the same for all models that it touches, in one line.
        source: package version and file that say so.
        find: whether it touches a model, and how.
    """

    why: str
    source: str
    find: Callable[[Quantized], Limitation | None]


@dataclass(frozen=True)
class Reads:
    """A checkpoint format that a runtime reads.

    Attributes:
        format: its name, as `formats.of` has it.
        engine: vLLM's EngineArgs that the runtime must be given for it.
        limits: what of it the runtime doesn't read.
        source: package version and files that say that it reads `studied`, but for the limits.
        studied: architectures whose way through it was read there.
        caches: how it keeps keys and values where the files say so, by their names in `qtool.scheme.CACHES`.
    """

    format: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    source: str = ""
    studied: frozenset[str] = frozenset()
    caches: frozenset[str] = frozenset()


def _as_it_is(launch: Launch, checkpoint: Checkpoint) -> Launch:
    return launch


def _in_its_own_words(error: BaseException) -> InputError | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What generates text from a checkpoint. A new one is a file that holds one of these, and a line in `facts`.

    Attributes:
        name: for `--runtime`. An interpreter that has it is found by the row of this name in
            `qtool.environments.table.ENGINES`, which also says with what it is installed.
        title: what people call it.
        version: that all this is known of.
        summary: one line about it.
        reads: the formats that it reads; "float" is a model that is not quantized.
        others: it is given formats that no runtime names, too, and says itself what it makes of them.
        by_conversion: it reads a file of its own, which is made of a checkpoint first: that it does says nothing about
            who reads the checkpoint itself, and it runs only where somebody names it.
        hardware: where it runs.
        plugin_of: the runtime that this one is a part of, and whose name stands for it too.
        worker: module that runs in its interpreter; None for one that qtool doesn't start.
        server: module of its OpenAI server and the words before the model's path; None where it has none.
        servers: the same for one that is spread over several hosts, of which all but one may be without a server.
        first: modules that its worker imports before anything else.
        sampling: what of vLLM's SamplingParams it can do; None is all.
        vllm: it takes vLLM's EngineArgs and variables.
        adapt: what it must be told besides for one checkpoint. Raises InputError for a model that it doesn't run.
        explain: what a failure of its means to a user, or None where its own words must do.
    """

    name: str
    title: str
    version: str
    summary: str
    reads: tuple[Reads, ...]
    others: bool = False
    by_conversion: bool = False
    hardware: tuple[Hardware, ...]
    plugin_of: str | None = None
    worker: str | None
    server: tuple[str, ...] | None = None
    servers: tuple[str, ...] | None = None
    first: tuple[str, ...] = ()
    sampling: frozenset[str] | None = None
    vllm: bool = True
    adapt: Callable[[Launch, Checkpoint], Launch] = _as_it_is
    explain: Callable[[BaseException], InputError | None] = _in_its_own_words

    def possible(self, wishes: Mapping[str, Any]) -> dict[str, Any]:
        """What of the sampling that a recipe or a model wishes for it can do; the rest is left out."""
        return {name: value for name, value in wishes.items() if self.sampling is None or name in self.sampling}

    def reading(self, format: str) -> Reads | None:
        """How it reads a format of those that it names, or None."""
        return next((reads for reads in self.reads if reads.format == format), None)

    def limitations(self, format: str, model: Quantized) -> list[Limitation]:
        """What it doesn't read of a model in this format."""
        return [limitation for _, limitation in self.limits(format, model)]

    def limits(self, format: str, model: Quantized) -> list[tuple[Limit, Limitation]]:
        """The same, each with what is known of it."""
        reads = self.reading(format)
        if reads is None:
            return []
        found = ((limit, limit.find(model)) for limit in (*reads.limits, self._cache_limit(reads)))
        return [(limit, limitation) for limit, limitation in found if limitation is not None]

    def _cache_limit(self, reads: Reads) -> Limit:
        """Keys and values that it keeps only as floats."""

        def find(model: Quantized) -> Limitation | None:
            if model.cache is None or model.cache in reads.caches:
                return None
            return Limitation(
                f"keys and values are to be kept as {model.cache}, which {self.title} doesn't read of {reads.format}",
                unread=True,
                hint="Quantize the original without --kv-cache.",
            )

        return Limit("the cache keeps keys and values in another way", reads.source, find)
