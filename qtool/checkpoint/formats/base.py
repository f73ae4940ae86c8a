"""What a checkpoint format is.

A format is one class in one file of this package. It says how a folder of it is recognised, which files it owns, how a
quantized layer lies in its tensors, and which schemes it can express. It knows nothing of who reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qtool.checkpoint.formats.fused import disagreements
from qtool.checkpoint.formats.scales import round_to
from qtool.checkpoint.formats.stored import Stored
from qtool.errors import InputError
from qtool.scheme import QuantizationArgs, Scheme, cache_name

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.formats.packed import PackedWeight
    from qtool.checkpoint.header import TensorInfo
    from qtool.checkpoint.reader import Checkpoint
    from qtool.quant.types import QuantizedCache, QuantizedLinear


@dataclass(frozen=True)
class Inexpressible:
    """What a format can't express of a plan.

    Attributes:
        text: one sentence.
        hint: what to do about it.
    """

    text: str
    hint: str


class Description(NamedTuple):
    """What tells a runtime how the tensors are quantized.

    Attributes:
        quantization_config: that key of config.json, or None for a config.json without it.
        files: further JSON files, by name.
    """

    quantization_config: dict[str, Any] | None
    files: dict[str, dict[str, Any]]


class UnknownScheme(InputError):
    """A layer is quantized in a way that qtool can't represent."""


class Format(ABC):
    """How a model lies in a folder: what every format says, also one that can only be read.

    Attributes:
        name: as config.json, `--format` and reports have it.
        title: one line for people.
        files: description files of its own, beside config.json.
        config_keys: of config.json that belong to the format and not to the model.
        weight_parts: last parts of the names of tensors that hold a weight; each linear layer has one of them.
        is_float: `FloatReader` reads it, and it can be quantized.
        cache_parts: last parts of the names of tensors that say how keys and values are kept.
    """

    name: str
    title: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config",)
    weight_parts: ClassVar[tuple[str, ...]] = ("weight",)
    is_float: ClassVar[bool] = False
    cache_parts: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        """Whether a folder is of this format, from its config.json and the names of its files."""

    @abstractmethod
    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        """How a layer is quantized, by its name without ".weight", from headers and descriptions; None for float.

        Raises UnknownScheme for ways that qtool can't represent, InputError for a description that makes no sense.
        """

    def read_linear(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear | None:
        """A layer by its name without ".weight", exactly as it was given to `tensors`; None for a float layer.

        Raises InputError for no such layer, as `scheme`, and for tensors that don't fit together.
        """
        self.weight(checkpoint, name)
        self.scheme(checkpoint, name)
        return None

    def cache_scheme(self, checkpoint: Checkpoint) -> QuantizationArgs | None:
        """How the keys and values of a model are kept, one of `qtool.scheme.CACHES`; None where they stay float.

        Raises UnknownScheme for ways that qtool can't represent.
        """
        return None

    def read_cache(self, checkpoint: Checkpoint, name: str) -> QuantizedCache | None:
        """The same for an attention module by its name, with scales. Raises InputError for tensors that don't fit."""
        return None

    def is_source(self, checkpoint: Checkpoint) -> bool:
        """Whether this model can be quantized."""
        return self.is_float

    def has_lost(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether integers or FP4 stand for a layer's weight, which is read as floats and has lost precision."""
        return False

    def weight(self, checkpoint: Checkpoint, name: str) -> TensorInfo:
        """Where a layer's weight lies. Raises InputError when there is no such layer."""
        parts = (part for part in self.weight_parts if f"{name}.{part}" in checkpoint)
        return checkpoint.info(f"{name}.{next(parts, self.weight_parts[0])}")

    def layers(self, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
        """Where the matrix of every layer lies that has one, by the layer's name without ".weight"."""
        found = {}
        for tensor in checkpoint.names:
            name, _, part = tensor.rpartition(".")
            info = checkpoint.info(tensor)
            if part in self.weight_parts and len(info.shape) == 2:
                found[name] = info
        return found


class PackedFormat(Format):
    """A format that may hold weights as something else, which is read as the floats that it stands for.

    Attributes:
        packed_parts: last parts of the names of tensors that hold a packed weight or say how to read it.
    """

    packed_parts: ClassVar[frozenset[str]]

    @abstractmethod
    def is_packed(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a layer's weight lies so."""

    @abstractmethod
    def packed_shape(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        """(out, in) of a packed layer. Raises InputError as `packed`."""

    @abstractmethod
    def packed(self, checkpoint: Checkpoint, name: str) -> PackedWeight:
        """A packed layer's weight. Raises InputError for tensors that don't fit together."""

    def has_lost(self, checkpoint: Checkpoint, name: str) -> bool:
        return self.is_packed(checkpoint, name)


class Writable(Format):
    """A format that qtool writes.

    Attributes:
        together: full names of small tensors that must lie in one file, in this order, if a model has them.
    """

    together: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def shard_name(self, i: int, n: int) -> str:
        """File name of shard `i` (from 1) of `n`."""

    @abstractmethod
    def index_name(self, n: int) -> str | None:
        """File name of the index over `n` shards, or None when the format goes without one."""

    @abstractmethod
    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        """Describe a model from its tensors' names, the scheme of every linear layer (None: float), and config.json."""


class Holding(Writable):
    """A format that a quantized model can be written in, layer by layer.

    Attributes:
        schemes: that it can express.
        caches: how it can say that keys and values are kept.
        parts: the last parts of the names of all tensors that it may keep of a layer.
    """

    schemes: ClassVar[tuple[Scheme, ...]]
    caches: ClassVar[tuple[QuantizationArgs, ...]] = ()
    parts: ClassVar[frozenset[str]]

    def expresses(self, scheme: Scheme) -> bool:
        """Whether a layer of this scheme can be written."""
        return scheme in self.schemes

    @abstractmethod
    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that stand for one quantized layer in a model of dtype `dtype`, by their full names.

        Raises QtoolError when a scale is not a positive finite number.
        """

    @abstractmethod
    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """About how many bytes the tensors of a layer [out, in] take, but for its bias."""

    def cache_problem(self, cache: QuantizationArgs) -> Inexpressible | None:
        """Why this format can't say that keys and values are kept so; None where it can."""
        if cache in self.caches:
            return None
        known = ", ".join(map(cache_name, self.caches))
        return Inexpressible(
            f"{self.name} can't say that keys and values are kept as {cache_name(cache)}",
            hint=f"{self.name} has {known}" if known else "leave out --kv-cache, or take another --format",
        )

    def problems(self, schemes: Mapping[str, Scheme | None]) -> list[Inexpressible]:
        """What this format can't express of a plan (layer name → scheme, None: float); empty when all is well."""
        refused: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            if scheme is not None and not self.expresses(scheme):
                refused.setdefault(scheme, []).append(name)
        known = ", ".join(dict.fromkeys(scheme.kind for scheme in self.schemes))
        found = [
            Inexpressible(
                f"{self.name} can't express {scheme.label}, which {len(names)} layers would be ({names[0]}, ...)",
                hint=f"{self.name} has {known}",
            )
            for scheme, names in refused.items()
        ]
        fused = "give the same policy to all layers that the runtime fuses"
        return found + [Inexpressible(text, hint=fused) for text in disagreements(schemes)]

    def mixes(self, config: Mapping[str, Any]) -> bool:
        """Whether runtimes find layers whose names end alike in several schemes, in a model of this config.json."""
        return True

    def misfit(self, name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Why a layer of this name and shape (out, in) can't be of a scheme that the format has; None where it can."""
        return None

    def storable_scale(self, value: float, dtype: torch.dtype) -> float:
        """The static input scale that a runtime will compute with when given `value` in a model of `dtype`. Whoever
        derives integers or a zero point from a scale must use this one."""
        return round_to(value, dtype)

    def storable_weight_scale(self, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
        """The same for a float32 weight scale of any shape, of a layer of this scheme."""
        return scale


class CachingFormat(Holding):
    """A format with tensors for how keys and values are kept: its `caches` aren't empty."""

    @abstractmethod
    def cache_tensors(self, name: str, cache: QuantizedCache) -> dict[str, torch.Tensor]:
        """The tensors that say how an attention module's keys and values are kept, by their full names."""


class QuantizedFormat(Holding):
    """A format for quantized models, whose layers can be read back as they were written.

    Attributes:
        scale_parts: those of `parts` that hold weight scales; the first that is there counts.
    """

    scale_parts: ClassVar[tuple[str, ...]] = ("weight_scale",)

    @abstractmethod
    def read(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        """The inverse of `tensors`, for a layer of a known scheme. Raises InputError as `read_linear`."""

    def read_linear(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear | None:
        self.weight(checkpoint, name)
        scheme = self.scheme(checkpoint, name)
        return None if scheme is None else self.read(Stored(checkpoint, name), scheme)

    def shape(self, stored: Stored, scheme: Scheme) -> tuple[int, int]:
        """(out, in) of a layer, from headers. Raises InputError when its weight is none of this scheme."""
        return stored.shape

    @abstractmethod
    def inputs(self, stored: Stored) -> tuple[float, int]:
        """Input scale and zero point of a static layer, without reading its weight."""

    def check_only_linears(self, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> None:
        """Raises InputError where something else is quantized than these linear layers, and keys and values."""


class HuggingFaceFiles(Writable):
    """File names that transformers, vLLM and SGLang look for."""

    def shard_name(self, i: int, n: int) -> str:
        return "model.safetensors" if n == 1 else f"model-{i:05d}-of-{n:05d}.safetensors"

    def index_name(self, n: int) -> str | None:
        return None if n == 1 else "model.safetensors.index.json"


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """What config.json says how the model is quantized; "unknown" where it says only that, None where it doesn't."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    return str((quantization.get("quant_method") if isinstance(quantization, dict) else None) or "unknown")
