"""The float model's weights: what the streamed decoder and the quantizer read them through.

A checkpoint's own numbers come from `checkpoint.floats.FloatReader`. A change of the whole model (a rotation of the
residual stream, say) is a `ModelWeights` that wraps another one and rewrites tensors as they are read. It is a pure
function of the checkpoint, so layers, experts, embeddings and what is written see the same numbers in every process
and after every interruption, and no more of it is in memory than what is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from qtool.errors import InputError
from qtool.quant.types import QuantizedCache, QuantizedLinear

_LARGEST = 1e15  # that an activation can be: squares of it, summed over all tokens, are still float32


class ModelWeights(Protocol):
    """A model's tensors by the checkpoint's names, on the device where the model is unless said otherwise.

    Whatever is read is finite; an InputError says what is wrong.
    """

    @property
    def where(self) -> str:
        """The checkpoint's folder, for messages."""
        ...

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the order to write them in."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor in the float model."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the float model."""
        ...

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor in `dtype`; None is its type of the float model."""
        ...

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a matrix, float32 [stop - start, in]."""
        ...

    def gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] of a matrix by their numbers, int64 [n], in its type of the float model, in main memory."""
        ...

    def unchanged(self, name: str) -> torch.Tensor:
        """What the output holds of a tensor that is not quantized, in main memory."""
        ...

    def linear(self, name: str) -> QuantizedLinear | None:
        """A quantized linear by its name without ".weight"; None when it is float."""
        ...

    def cache(self, name: str) -> QuantizedCache | None:
        """How the keys and values of an attention module are kept, by its name; None where they stay float."""
        ...

    def row_step(self, name: str) -> int:
        """How many rows to read at a time; reads that begin at a multiple of it cost least."""
        ...

    def holding(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Within the block no file is read twice for these tensors, which are kept as they are stored."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Within the block what is read on a device may be damaged; when it ends InputError tells."""
        ...


class StoredWeights:
    """The parameters of a decoder layer or an expert, read from the checkpoint as they are needed.

    Args:
        weights: of the model.
        stored: its names of the parameters, by the names to use here.
    """

    def __init__(self, weights: ModelWeights, stored: Mapping[str, str]) -> None:
        self._weights, self._stored = weights, stored

    def shape(self, linear: str) -> tuple[int, int]:
        out, width = self._weights.shape(self._stored[f"{linear}.weight"])
        return out, width

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        name = self._stored[f"{linear}.weight"]
        step = self._weights.row_step(name)
        if stop - start <= step:
            return self._weights.rows(name, start, stop)
        # From the first row of a block on, so that no block of scales is read twice.
        first, out = start, None
        while first < stop:
            last = min(stop, first - first % step + step)
            rows = self._weights.rows(name, first, last)
            if out is None:
                out = rows.new_empty(stop - start, rows.shape[1])
            out[first - start : last - start] = rows
            first = last
        assert out is not None
        return out

    def vector(self, name: str) -> torch.Tensor | None:
        stored = self._stored.get(name)
        if stored is None or len(self._weights.shape(stored)) != 1:
            return None
        return self._weights.tensor(stored).float()


def refuse_damage(activations: torch.Tensor, name: str, weights: ModelWeights) -> None:
    """Raises InputError when activations of a layer or linear, or their largest magnitudes, can't be true."""
    refuse_large(float(largest(activations)), name, weights)


def largest(activations: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, []; NaN where there is one."""
    low, high = activations.aminmax()
    return torch.maximum(-low, high)


def refuse_large(largest: float, name: str, weights: ModelWeights) -> None:
    """Raises InputError when this can't be the largest magnitude of a layer's or linear's activations."""
    if largest <= _LARGEST:  # false for NaN
        return
    size = f"as large as {largest:.0e}" if math.isfinite(largest) else "not finite"
    raise InputError(
        f"activations of {name} are {size}; the weights up to there are damaged",
        where=weights.where,
        hint="qtool inspect --tensors shows the range of each; download the model again",
    )
