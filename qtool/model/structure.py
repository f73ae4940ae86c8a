"""Values that hold tensors: tuples, lists, mappings, and whatever else, nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a value, depth first."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)


def mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same structure with every tensor changed; what holds no tensor is the same object."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if next(tensors_in(value), None) is None:
        return value
    if isinstance(value, tuple):
        parts = [mapped(each, change) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    return {key: mapped(each, change) for key, each in value.items()}


def alike(first: Any, second: Any) -> bool:
    """Whether two values of one structure hold equal tensors; NaN equals NaN."""
    ones, others = list(tensors_in(first)), list(tensors_in(second))
    return len(ones) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(torch.isclose(a, b, 0, 0, equal_nan=True).all())
        for a, b in zip(ones, others, strict=True)
    )
