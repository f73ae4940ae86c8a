"""What the units of the work hand out, and how it gets into the output's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from qtool.checkpoint.formats import QuantizedFormat
from qtool.checkpoint.transposed import is_transposed
from qtool.checkpoint.writer import CheckpointWriter
from qtool.model.decoder import DecoderStream
from qtool.quant.report import GroupReport
from qtool.quant.types import QuantizedCache, QuantizedLinear
from qtool.transfers import Behind


class Linear(NamedTuple):
    """A quantized linear to write, under the checkpoint's name without ".weight"."""

    name: str
    linear: QuantizedLinear


class Float(NamedTuple):
    """A float tensor to write in place of the checkpoint's of this name, in main memory."""

    name: str
    tensor: torch.Tensor


class Cache(NamedTuple):
    """How keys and values are kept, under the checkpoint's name of their attention module."""

    name: str
    cache: QuantizedCache


class Output(NamedTuple):
    """What a lot of experts adds to the layer's output: float32 [n, hidden], for the task's tokens, where these are."""

    tensor: torch.Tensor


class Row(NamedTuple):
    """How a group came out."""

    report: GroupReport


Piece = Linear | Float | Cache | Output | Row


@dataclass
class Written:
    """What of a unit's pieces is not for the files.

    Attributes:
        reports: how its groups came out.
        output: of its experts, if it has any, as in `Output`.
    """

    reports: list[GroupReport] = field(default_factory=list)
    output: torch.Tensor | None = None


class PieceWriter:
    """Writes a model tensor by tensor: pieces as they come, and everything else as the float model has it.

    Args:
        writer: of the output.
        model: the float model.
        format: of the output.
        behind: does the writing.
    """

    def __init__(self, writer: CheckpointWriter, model: DecoderStream, format: QuantizedFormat, behind: Behind) -> None:
        self._writer, self._model, self._format, self._behind = writer, model, format, behind

    def write(self, pieces: Iterable[Piece]) -> Written:
        """Write what a unit gives, one by one: there may be more of it than memory."""
        written = Written()
        weights, config = self._model.weights, self._model.checkpoint.config
        for piece in pieces:
            match piece:
                case Linear(name, linear):
                    dtype, transposed = weights.dtype(f"{name}.weight"), is_transposed(config, name)
                    add = partial(self._writer.add_linear, name, linear, dtype, transposed=transposed)
                    self._behind.do(add, linear.weight.nbytes)
                case Float(name, tensor):
                    matrix = name.endswith(".weight") and is_transposed(config, name.removesuffix(".weight"))
                    stored = (tensor.t() if matrix else tensor).to(weights.dtype(name))
                    self._behind.do(partial(self._writer.add, name, stored), stored.nbytes)
                case Cache(name, cache):
                    self._behind.do(partial(self._writer.add_cache, name, cache))
                case Row(report):
                    written.reports.append(report)
                case Output(tensor):
                    written.output = tensor
        return written

    def then(self, work: Callable[[], None]) -> None:
        """Do this once all that was given so far is written."""
        self._behind.do(work)

    def wait(self) -> None:
        """Until all that was given so far is written."""
        self._behind.wait()

    def write_outside(self) -> None:
        """Write what lies outside of the decoder layers. Raises InputError when that is damaged."""
        layers = tuple(f"{self._model.layer_name(index)}." for index in range(self._model.depth))
        outside = [name for name in self._model.weights.names if not name.startswith(layers)]
        self._writer.expect(outside)
        for name in outside:
            if name not in self._writer:
                self._writer.add(name, self._model.weights.unchanged(name))

    def write_rest(self, layer: str) -> None:
        """Write every tensor of a decoder layer that no unit has written."""
        for name in self._model.weights.names:
            if name.startswith(f"{layer}.") and name not in self._writer and not self._belongs_to_quantized(name):
                self._writer.add(name, self._model.weights.unchanged(name))

    def _belongs_to_quantized(self, name: str) -> bool:
        """Whether this is the weight or bias of a linear that is written in another form, always with scales."""
        linear, _, part = name.rpartition(".")
        parts = self._format.parts - {"weight", "bias"}
        return part in ("weight", "bias") and any(f"{linear}.{each}" in self._writer for each in parts)
