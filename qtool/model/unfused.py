"""Experts that a checkpoint stores together, read one at a time, under names of their own.

A tensor [experts, rows, columns] becomes a matrix for each expert's gate, up and down, as runtimes read quantized
experts, whatever way the file has them: transposed, gate and up one after the other or row by row in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qtool.model.architectures import FusedExperts
from qtool.model.names import ExpertNames, Names
from qtool.model.weights import ModelWeights
from qtool.quant.types import QuantizedCache

_STEP = 1 << 22  # numbers to read at a time
_KEPT = 2  # experts' blocks in memory: gate and up, and down


@dataclass(frozen=True)
class Slice:
    """One expert's matrix or bias in a stored tensor.

    Attributes:
        tensor: the checkpoint's name.
        expert: its number.
        rows: of the matrix, after it is transposed.
        transposed: the tensor is [experts, in, out].
    """

    tensor: str
    expert: int
    rows: slice
    transposed: bool

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """From the expert's part of the tensor."""
        return (block.t() if self.transposed else block)[self.rows]


class Unfused:
    """A model's weights with matrices in place of fused experts; all else is as it was.

    Args:
        inner: the weights of the checkpoint.
        slices: of fused tensors, by the names to give them.
    """

    def __init__(self, inner: ModelWeights, slices: Mapping[str, Slice]) -> None:
        self._inner, self._slices = inner, slices
        self._blocks: dict[tuple[str, int], torch.Tensor] = {}
        by_tensor: dict[str, list[str]] = {}
        for name, part in slices.items():
            by_tensor.setdefault(part.tensor, []).append(name)
        self.names = [each for name in inner.names for each in by_tensor.get(name, [name])]
        self._hidden = by_tensor.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._slices or (name not in self._hidden and name in self._inner)

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._slices.get(name)
        if part is None:
            return self._inner.shape(name)
        stored = self._inner.shape(part.tensor)[1:]
        sizes = stored[::-1] if part.transposed else stored
        return (len(range(*part.rows.indices(sizes[0]))), *sizes[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(self._source(name))

    def nbytes(self, name: str) -> int:
        part = self._slices.get(name)
        if part is None:
            return self._inner.nbytes(name)
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        part = self._slices.get(name)
        if part is None:
            return self._inner.tensor(name, dtype)
        return part.of(self._block(part)).to(dtype or self.dtype(name)).contiguous()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        part = self._slices.get(name)
        if part is None:
            return self._inner.rows(name, start, stop)
        return part.of(self._block(part))[start:stop].contiguous()

    def gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self.tensor(name).cpu()[ids] if name in self._slices else self._inner.gather(name, ids)

    def unchanged(self, name: str) -> torch.Tensor:
        return self.tensor(name).cpu() if name in self._slices else self._inner.unchanged(name)

    def linear(self, name: str) -> Any:
        return None if f"{name}.weight" in self._slices else self._inner.linear(name)

    def cache(self, name: str) -> QuantizedCache | None:
        return self._inner.cache(name)

    def row_step(self, name: str) -> int:
        if name not in self._slices:
            return self._inner.row_step(name)
        return max(1, _STEP // self.shape(name)[-1])

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        with self._inner.holding([name for name in names if name not in self._slices]):
            yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _source(self, name: str) -> str:
        part = self._slices.get(name)
        return name if part is None else part.tensor

    def _block(self, part: Slice) -> torch.Tensor:
        """An expert's part of a tensor, float32."""
        key = (part.tensor, part.expert)
        if key not in self._blocks:
            while len(self._blocks) >= _KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = self._inner.rows(part.tensor, part.expert, part.expert + 1)[0]
        return self._blocks[key]


def slices(fused: FusedExperts, module: str, names: Names, weights: ModelWeights) -> dict[str, Slice] | None:
    """How to read the experts of a module that the checkpoint stores together; None where it doesn't.

    Args:
        module: the whole name of the experts' module in the model.
    """
    stored = _tensors(fused, module, names)
    if stored is None or any(name not in weights or len(weights.shape(name)) != 3 for name, _ in stored.values()):
        return None
    stem, result = stem_of(stored["down_proj"][0]), dict[str, Slice]()
    for number in range(fused.count):
        for part, (name, rows) in stored.items():
            tensor = fused.down if part == "down_proj" else fused.gate_up
            shape, width = weights.shape(name), fused.hidden if tensor == fused.gate_up else fused.intermediate
            transposed = fused.transposed if shape[1] == shape[2] else shape[2] != width
            result[f"{stem}.{number}.{part}.weight"] = Slice(name, number, rows, transposed)
            bias = _stored(f"{module}.{tensor}_bias", names)
            if fused.has_bias and bias is not None and bias in weights:
                result[f"{stem}.{number}.{part}.bias"] = Slice(bias, number, rows, False)
    return result


def stem_of(stored: str) -> str:
    """What the experts are called, by the name of a tensor that holds them all."""
    found = re.match(r"(.*\.experts)\.", stored)
    return found[1] if found else f"{stored.removesuffix('.weight').rpartition('.')[0]}.experts"


def expert_names(stem: str, fused: FusedExperts) -> list[ExpertNames]:
    """The linears of each expert under such a name."""
    gate = "gate_proj" if fused.has_gate else None
    return [
        ExpertNames(gate and f"{stem}.{number}.{gate}", f"{stem}.{number}.up_proj", f"{stem}.{number}.down_proj")
        for number in range(fused.count)
    ]


def _tensors(fused: FusedExperts, module: str, names: Names) -> dict[str, tuple[str, slice]] | None:
    """The stored tensor that each of an expert's matrices is in, and its rows of that; None where it isn't known."""
    down = _stored(f"{module}.{fused.down}", names)
    gate_up = f"{module}.{fused.gate_up}"
    made, together = names.conversion(gate_up), _stored(gate_up, names)
    if down is None:
        return None
    if together is not None:
        return {part: (down if part == "down_proj" else together, rows) for part, rows in _rows(fused).items()}
    if made is None or fused.interleaved or not fused.has_gate:
        return None
    parts = [each for found in made.parts.values() for each in found]
    operations = [(type(each).__name__, getattr(each, "dim", None)) for each in made.converter.operations]
    whole, odd, even = slice(None), slice(1, None, 2), slice(0, None, 2)
    match operations, parts:
        case [("Concatenate", 1)], [gate, up]:  # Step 3.7: the gates of all experts in one tensor, their ups in another
            return {"gate_proj": (gate, whole), "up_proj": (up, whole), "down_proj": (down, whole)}
        case [("Interleave", 1)], [both]:  # Inkling: rows of gate and up in turn
            return {"gate_proj": (both, even), "up_proj": (both, odd), "down_proj": (down, whole)}
    return None


def _stored(name: str, names: Names) -> str | None:
    """The checkpoint's name of a parameter that is one tensor there, as it is or transposed."""
    made = names.conversion(name)
    if made is None:
        return names.stored(name)
    parts = [each for found in made.parts.values() for each in found]
    known = all(type(operation).__name__ == "Transpose" for operation in made.converter.operations)
    return parts[0] if len(parts) == 1 and known else None


def _rows(fused: FusedExperts) -> dict[str, slice]:
    """Of each of an expert's matrices, in the tensor that it is in."""
    width = fused.intermediate
    if not fused.has_gate:
        return {"up_proj": slice(None), "down_proj": slice(None)}
    if fused.interleaved:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2), "down_proj": slice(None)}
    return {"gate_proj": slice(0, width), "up_proj": slice(width, None), "down_proj": slice(None)}
