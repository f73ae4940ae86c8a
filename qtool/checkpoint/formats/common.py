"""What the checkpoint formats have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from qtool.errors import InputError, QtoolError
from qtool.scheme import W8A8, W8A8_DYNAMIC, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint
    from qtool.quant.types import QuantizedLinear

Mode = Literal["static", "dynamic", "float"]
_SCHEMES: dict[Mode, Scheme | None] = {"static": W8A8, "dynamic": W8A8_DYNAMIC, "float": None}

# Runtimes run these side by side as one matrix product, so their schemes and input scales must agree.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}


class Problem(str):
    """One sentence about what a format or its runtime can't express; `fatal` when the result would not load."""

    fatal: bool

    def __new__(cls, text: str, *, fatal: bool) -> Problem:
        self = super().__new__(cls, text)
        self.fatal = fatal
        return self


class Description(NamedTuple):
    """What tells a runtime how the tensors are quantized.

    Attributes:
        quantization_config: that key of config.json, or None for a config.json without it.
        files: further JSON files, by name.
    """

    quantization_config: dict[str, Any] | None
    files: dict[str, dict[str, Any]]


class Format(ABC):
    """How one runtime wants a W8A8 model: file names, tensors, and the description that goes with them."""

    name: ClassVar[str]

    @abstractmethod
    def shard_name(self, i: int, n: int) -> str:
        """File name of shard `i` (from 1) of `n`."""

    @abstractmethod
    def index_name(self, n: int) -> str | None:
        """File name of the index over `n` shards, or None when the format goes without one."""

    @abstractmethod
    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that stand for one quantized layer in a model of dtype `dtype`, by their full names.

        Raises QtoolError when a scale is not a positive finite number.
        """

    @abstractmethod
    def describe(self, names: Sequence[str], linears: Mapping[str, Mode], config: Mapping[str, Any]) -> Description:
        """Describe a model from its tensors' names, the mode of every linear layer, and its config.json."""

    @abstractmethod
    def mode(self, checkpoint: Checkpoint, name: str) -> Mode | None:
        """How a layer is quantized, from headers and descriptions; None for ways that qtool can't represent."""

    @abstractmethod
    def read(self, stored: Stored, mode: Mode) -> QuantizedLinear:
        """The inverse of `tensors`, for a layer of a known mode."""

    @abstractmethod
    def inputs(self, stored: Stored) -> tuple[float, int]:
        """Input scale and zero point of a static layer, without reading its weight."""

    def read_linear(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear | None:
        """A layer by its name without ".weight", exactly as it was given to `tensors`; None for a float layer.

        Raises InputError for a scheme that qtool can't represent, and for tensors that don't fit together.
        """
        mode, stored = self.mode(checkpoint, name), Stored(checkpoint, name)
        if mode is None:
            raise stored.error("quantized, but not W8A8 with per-tensor static or per-token dynamic activations")
        return None if mode == "float" else self.read(stored, mode)

    def problems(self, linears: Mapping[str, Mode]) -> list[Problem]:
        """What this format or its runtime can't express of a plan (layer name → mode); empty when all is well."""
        return mixed_fusions(linears)

    def storable_scale(self, value: float, dtype: torch.dtype | None = None) -> float:
        """The static input scale that a runtime will compute with when given `value` in a model of `dtype`
        (bfloat16 unless told). Whoever derives integers or an offset from a scale must use this one."""
        return round_to(value, dtype)

    def storable_weight_scale(
        self, scale: torch.Tensor, mode: Mode = "dynamic", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The same for a float32 weight scale of any shape, of a layer whose activations are `mode`."""
        return scale


def mode_of(scheme: Scheme | None) -> Mode:
    """A scheme in the word that formats have for it. Raises InputError for one that they have none for."""
    for mode, known in _SCHEMES.items():
        if known == scheme:
            return mode
    assert scheme is not None
    raise InputError(
        f"no checkpoint format stores {scheme.label} yet", hint="int8 weights and activations: W8A8 or W8A8-dynamic"
    )


def round_to(value: float, dtype: torch.dtype | None) -> float:
    """`value` rounded to `dtype` (bfloat16 unless told), kept above zero."""
    import torch

    dtype = dtype or torch.bfloat16
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return max(float(rounded), torch.finfo(dtype).tiny)


def fusions(linears: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Groups of layers that runtimes fuse: (fused name, names of its parts among `linears`)."""
    groups: dict[str, list[str]] = {}
    for name in linears:
        fused = fused_name(name)
        if fused:
            groups.setdefault(fused, []).append(name)
    yield from groups.items()


def fused_name(name: str) -> str | None:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_FUSED[last]}" if last in _FUSED else None


def mixed_fusions(linears: Mapping[str, Mode]) -> list[Problem]:
    return [
        Problem(
            f"{fused} is one layer at run time, but its parts differ: "
            + ", ".join(f"{part.rpartition('.')[2]} {linears[part]}" for part in parts),
            fatal=True,
        )
        for fused, parts in fusions(linears)
        if len({linears[part] for part in parts}) > 1
    ]


def check_scales(name: str, linear: QuantizedLinear) -> None:
    """Raises QtoolError unless every scale is a positive finite number and the zero point an int8."""
    import torch

    scale = linear.weight_scale
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise QtoolError(
            "a weight scale is not a positive number", where=name, hint="Check the weights for NaN or Inf."
        )
    if linear.input_scale is not None and not (math.isfinite(linear.input_scale) and linear.input_scale > 0):
        raise QtoolError(f"input scale {linear.input_scale} is not a positive number", where=name)
    if linear.is_static and (linear.input_zero_point is None or not -128 <= linear.input_zero_point <= 127):
        raise QtoolError(f"input zero point {linear.input_zero_point} is not an int8", where=name)


class Stored:
    """One layer's tensors in a checkpoint, fetched with the checks that a reader owes its caller."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint = checkpoint
        self.name = name

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.checkpoint

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the int8 weight, from its header. Raises InputError when it is something else."""
        info = self.checkpoint.info(f"{self.name}.weight")
        if info.dtype != "I8" or len(info.shape) != 2:
            raise self.error(f"weight is {info.dtype} {list(info.shape)}, expected int8 [out, in]")
        return info.shape[0], info.shape[1]

    def weight(self) -> torch.Tensor:
        """int8 [out, in]."""
        out_size, in_size = self.shape
        return self.checkpoint.tensor(f"{self.name}.weight").view(out_size, in_size)

    def bias(self) -> torch.Tensor | None:
        return self.checkpoint.tensor(f"{self.name}.bias") if self.has("bias") else None

    def vector(self, part: str, size: int) -> torch.Tensor:
        """A tensor of `size` numbers, whatever its axes of length 1; a single number is repeated."""
        tensor = self.checkpoint.tensor(f"{self.name}.{part}").reshape(-1)
        if tensor.numel() not in (1, size):
            raise self.error(f"{part} has {tensor.numel()} numbers, expected {size}")
        return tensor.expand(size).contiguous()

    def scale(self, part: str, size: int) -> torch.Tensor:
        """float32 [size], positive and finite."""
        scale = self.vector(part, size).float()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise self.error(f"{part} holds a number that is not positive and finite")
        return scale

    def constant(self, part: str, size: int) -> float:
        """The one value of a tensor that holds one number, or `size` times the same."""
        vector = self.vector(part, size)
        if bool((vector != vector[0]).any()):
            raise self.error(f"{part} differs per channel, where one number for the whole tensor is expected")
        return float(vector[0])

    def offset(self, part: str, size: int) -> int:
        value = self.constant(part, size)
        if not (value.is_integer() and -128 <= value <= 127):
            raise self.error(f"{part} is {value}, expected an integer in -128..127")
        return int(value)

    def input_scale(self, size: int) -> float:
        value = self.constant("input_scale", size)
        if not (math.isfinite(value) and value > 0):
            raise self.error(f"input_scale is {value}, expected a positive number")
        return value

    def zero(self, part: str, size: int) -> None:
        """Raises InputError unless that tensor is absent or all zeros (symmetric weights)."""
        if self.has(part) and bool(self.vector(part, size).any()):
            raise self.error(f"{part} is not zero: asymmetric weights are not supported")

    def error(self, what: str) -> InputError:
        return InputError(f"{self.name}: {what}", where=str(self.checkpoint.path))
