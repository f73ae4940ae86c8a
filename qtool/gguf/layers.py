"""A checkpoint as a float model whose quantized layers also give their integers and scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import formats
from qtool.checkpoint.formats import QuantizedFormat
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import quantized_layers
from qtool.checkpoint.transposed import is_transposed
from qtool.errors import InputError
from qtool.gguf.blocks import block_type

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear
    from qtool.scheme import Scheme


class Layers:
    """A checkpoint as the converter is to see it: a float model, whose tensors lie as they do in the files.

    Attributes:
        format: of the checkpoint.
        schemes: of the quantized layers, by their names without ".weight".

    Raises InputError for a format that qtool doesn't read.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.format = source, formats.of(source)
        self.schemes: Mapping[str, Scheme] = {}
        self._last: tuple[str, QuantizedLinear] | None = None  # it is asked for three times
        if isinstance(self.format, QuantizedFormat):
            self.schemes = quantized_layers(source, self.format)
        elif self.format is not formats.PLAIN:
            hint = f"It reads {', '.join(formats.NAMES)}, and float models."
            what = f"quantized with {self.format.name}, which qtool doesn't convert"
            raise InputError(what, where=str(source.path), hint=hint)

    def names(self) -> Iterator[str]:
        """Of every tensor of the float model."""
        for name in self.source.names:
            owner, _, part = name.rpartition(".")
            if part in self.format.cache_parts:
                continue  # llama.cpp keeps keys and values as its own options say
            if owner not in self.schemes or part == "bias":
                yield name
            elif part in self._quantized.weight_parts:
                yield f"{owner}.weight"

    def scheme(self, name: str) -> Scheme | None:
        """Of a tensor that is quantized."""
        owner, _, part = name.rpartition(".")
        return self.schemes.get(owner) if part == "weight" else None

    def shape(self, name: str) -> tuple[int, ...]:
        if self.scheme(name) is None:
            return tuple(self.source.info(name).shape)
        return self._as_stored(name, self._matrix(name))

    def scales_shape(self, name: str) -> tuple[int, ...]:
        """Of a quantized tensor's scales: [out, parts], where `parts` is how many a row has."""
        return self._as_stored(name, (self._matrix(name)[0], self._parts(name)))

    def blocks(self, name: str) -> str | None:
        """The ggml type that holds this tensor's integers, or None."""
        scheme = self.scheme(name)
        return block_type(scheme.weights, self._matrix(name)[1]) if scheme else None

    def values(self, name: str) -> torch.Tensor:
        """As it is, or float32 of a quantized tensor."""
        if self.scheme(name) is None:
            return self.source.tensor(name)
        return self._turned(name, self._linear(name).dequantize())

    def integers(self, name: str) -> torch.Tensor:
        """float32, of a quantized tensor."""
        return self._turned(name, self._linear(name).weight.float())

    def scales(self, name: str) -> torch.Tensor:
        """float32, as `scales_shape` says."""
        scale = self._linear(name).weight_scale.float()
        whole = scale if scale.dim() == 2 else scale[:, None]
        return self._turned(name, whole.expand(self._matrix(name)[0], self._parts(name)))

    @property
    def _quantized(self) -> QuantizedFormat:
        assert isinstance(self.format, QuantizedFormat)
        return self.format

    def _stored(self, name: str) -> Stored:
        return Stored(self.source, name.removesuffix(".weight"))

    def _matrix(self, name: str) -> tuple[int, int]:
        """(out, in) of a quantized tensor."""
        return self._quantized.shape(self._stored(name), self._known(name))

    def _parts(self, name: str) -> int:
        return self._matrix(name)[1] // (self._known(name).weights.group_size or self._matrix(name)[1])

    def _known(self, name: str) -> Scheme:
        return self.schemes[name.removesuffix(".weight")]

    def _linear(self, name: str) -> QuantizedLinear:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._quantized.read(self._stored(name), self._known(name)))
        return self._last[1]

    def _is_turned(self, name: str) -> bool:
        return is_transposed(self.source.config, name.removesuffix(".weight"))

    def _as_stored(self, name: str, shape: tuple[int, int]) -> tuple[int, ...]:
        return shape[::-1] if self._is_turned(name) else shape

    def _turned(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t().contiguous() if self._is_turned(name) else matrix
