"""Which tensors of a checkpoint a model's own code looks into, and which numbers of its parameters nobody wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

# What no row or column of the tests' matrices is all of, nor any other of their tensors holds.
_UNSEEN = {torch.int8: -128, torch.int32: -(2**31), torch.int64: -(2**63)}


class Watched(torch.Tensor):
    """A tensor that says when its numbers are asked for."""

    looked_into: ClassVar[set[str]] = set()
    tensor_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        about = getattr(func, "__name__", "") in ("__get__", "size", "dim", "numel", "element_size")
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Watched) and not about and hasattr(value, "tensor_name"):
                cls.looked_into.add(value.tensor_name)
        plain = [
            value.as_subclass(torch.Tensor) if isinstance(value, Watched) and not about else value for value in args
        ]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain, **(kwargs or {}))


def watched(weights: Iterable[tuple[str, torch.Tensor]], names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors. Their names are added to `names` as they come, to `Watched.looked_into` as they are read."""
    for name, tensor in weights:
        names.add(name)
        seen = tensor.as_subclass(Watched)
        seen.tensor_name = name
        yield name, seen


def empty(parameter: torch.Tensor) -> None:
    """Fill a parameter with what no checkpoint holds."""
    parameter.data.fill_(torch.nan if parameter.is_floating_point() else _UNSEEN.get(parameter.dtype, 0))


def is_untouched(parameter: torch.Tensor) -> bool:
    """Whether some number of it is still what `empty` wrote. Integers of a matrix can be that, but no whole row."""
    data = parameter.data
    if data.is_floating_point():
        return bool(data.isnan().any())
    same = data == _UNSEEN.get(data.dtype, 0)
    return bool((same.all(-1).any() or same.all(-2).any()) if data.dim() > 1 else same.any())
