"""A checkpoint as a float model whose quantized layers also give their integers and scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.checkpoint import formats
from qtool.checkpoint.formats import QuantizedFormat
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import quantized_layers
from qtool.errors import InputError
from qtool.gguf.blocks import block_type

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear
    from qtool.scheme import Scheme


@dataclass(frozen=True)
class Layers:
    """A checkpoint as the converter is to see it: a float model.

    Attributes:
        schemes: of the quantized layers, by their names without ".weight".
    """

    source: Checkpoint
    format: formats.Format
    schemes: Mapping[str, Scheme]

    @classmethod
    def of(cls, source: Checkpoint) -> Layers:
        """Raises InputError for a format that qtool doesn't read."""
        form = formats.of(source)
        if form is formats.PLAIN:
            return cls(source, form, {})
        if not isinstance(form, QuantizedFormat):
            hint = f"It reads {', '.join(formats.NAMES)}, and float models."
            what = f"quantized with {form.name}, which qtool doesn't convert"
            raise InputError(what, where=str(source.path), hint=hint)
        return cls(source, form, quantized_layers(source, form))

    def names(self) -> Iterator[str]:
        """Of every tensor of the float model."""
        for name in self.source.names:
            owner, _, part = name.rpartition(".")
            if owner not in self.schemes or part == "bias":
                yield name
            elif part in self._quantized.weight_parts:
                yield f"{owner}.weight"

    def scheme(self, name: str) -> Scheme | None:
        """Of a tensor that is quantized."""
        owner, _, part = name.rpartition(".")
        return self.schemes.get(owner) if part == "weight" else None

    def shape(self, name: str) -> tuple[int, ...]:
        scheme = self.scheme(name)
        if scheme is None:
            return tuple(self.source.info(name).shape)
        return self._quantized.shape(self._stored(name), scheme)

    def blocks(self, name: str) -> str | None:
        """The ggml type that holds this tensor's integers, or None."""
        scheme = self.scheme(name)
        return block_type(scheme.weights, self.shape(name)[1]) if scheme else None

    def parts(self, name: str) -> int:
        """How many scales a row of a quantized tensor has."""
        scheme = self.scheme(name)
        assert scheme is not None
        return self.shape(name)[1] // scheme.weights.group_size if scheme.weights.group_size else 1

    def values(self, name: str) -> torch.Tensor:
        """As it is, or float32 of a quantized tensor."""
        return self.source.tensor(name) if self.scheme(name) is None else self._linear(name).dequantize()

    def integers(self, name: str) -> torch.Tensor:
        """float32 [out, in]."""
        return self._linear(name).weight.float()

    def scales(self, name: str) -> torch.Tensor:
        """float32 [out, parts]."""
        scale = self._linear(name).weight_scale.float()
        return (scale if scale.dim() == 2 else scale[:, None]).expand(self.shape(name)[0], self.parts(name))

    @property
    def _quantized(self) -> QuantizedFormat:
        assert isinstance(self.format, QuantizedFormat)
        return self.format

    def _stored(self, name: str) -> Stored:
        return Stored(self.source, name.removesuffix(".weight"))

    def _linear(self, name: str) -> QuantizedLinear:
        scheme = self.scheme(name)
        assert scheme is not None
        return self._quantized.read(self._stored(name), scheme)
