"""The weights around the decoder layers, read when the model's own code uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qtool.model.loader import Loader
from qtool.model.skeleton import Skeleton
from qtool.model.structure import mapped

_KEPT_BYTES = 1 << 26  # of a tensor that stays in memory once it is read


class Outside(TorchFunctionMode):
    """Within the block, parameters that aren't in decoder layers are on the meta device no more.

    Of a table that tokens look up rows of (embeddings, per-layer embeddings, positions), only these rows are read.

    Args:
        dtype: to compute in, but for what the architecture wants in float32.
    """

    def __init__(self, skeleton: Skeleton, loader: Loader, dtype: torch.dtype) -> None:
        super().__init__()
        self._loader, self._dtype = loader, dtype
        self._names = {id(parameter): name for name, parameter in skeleton.outer_parameters.items()}
        self._kept: dict[str, torch.Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__":
            if id(args[0]) in self._names and function == torch.Tensor.device.__get__:
                return self._loader.device
            return function(*args, **kwargs)
        if function is torch.embedding and id(args[0]) in self._names:
            return self._looked_up(args[0], args[1])
        if function is torch.nn.functional.embedding and id(args[1]) in self._names:
            return self._looked_up(args[1], args[0])
        return function(*mapped(args, self._loaded), **mapped(kwargs, self._loaded))

    def _loaded(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names.get(id(tensor))
        return tensor if name is None else self._whole(name, tuple(tensor.shape))

    def _whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._loader.parameter(name, shape, self._dtype)
        if tensor.nbytes <= _KEPT_BYTES:
            self._kept[name] = tensor
        return tensor

    def _looked_up(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., width] of a table for numbers [...]."""
        unique, compact = torch.unique(ids, return_inverse=True)
        rows = self._loader.rows(self._names[id(table)], unique.cpu(), self._dtype)
        return torch.nn.functional.embedding(compact.to(rows.device), rows)
