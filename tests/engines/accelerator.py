"""An accelerator for machines that have none: it computes as the CPU does, and refuses what CUDA refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda")
_PLACES = {  # what a tensor says about where it is
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
}
# What only looks at a tensor, or copies it as it is.
_NO_WORK = {
    *("__get__", "__getitem__", "__setitem__", "__len__", "__set__", "__hash__", "numpy", "__array__", "data_ptr"),
    *("view", "reshape", "flatten", "unflatten", "contiguous", "detach", "clone", "copy_", "to", "cpu", "size", "dim"),
    *("t", "transpose", "split", "unbind", "narrow", "expand", "is_floating_point", "is_contiguous", "numel", "stride"),
    *("untyped_storage", "element_size", "requires_grad_", "is_complex", "storage_offset", "view_as", "permute"),
    *("empty", "empty_like", "new_empty", "zeros", "zeros_like", "cat", "stack", "as_tensor"),
}


class Accelerator(TorchFunctionMode):
    """Within the block the device "cuda" has a memory of its own.

    Its tensors lie in main memory all the same, known by their storages, so that every number is the CPU's. Operations
    on tensors of both places raise as CUDA's do. Allowed are single numbers (0-dimensional tensors) and index tensors
    of main memory beside tensors of the device, and copies.

    Torch's functions are counted where Python calls them; what they call inside isn't known by its storage yet.

    Args:
        limit: bytes; computing on tensors of more in main memory is noted.

    Attributes:
        operations: how many ran on the device.
        in_main_memory: what computed on a large tensor in main memory, as "file:function of qtool: operation".
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        super().__init__()
        self.operations = 0
        self.in_main_memory: set[str] = set()
        self._limit = limit
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out again

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _PLACES:
            return _PLACES[func] if self.holds(args[0]) else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._move(args[0], *(args[1:] if func is torch.Tensor.to else ["cpu"]), **kwargs)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.holds(args[0]):
            raise TypeError("can't convert a tensor on cuda to numpy")
        tensors = [*_tensors([args, kwargs])]
        here = any(map(self.holds, tensors))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            tensors = self._indexed(*args)
        if func is not torch.Tensor.copy_ and any(map(self.holds, tensors)):
            for tensor in tensors:
                if tensor.dim() and not self.holds(tensor):
                    raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, cuda and cpu")
        if func in (torch.Tensor.__getitem__, torch.Tensor.copy_):
            here = self.holds(args[0])
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu" if here else kwargs["device"]
        result = func(*args, **kwargs)
        if not here and func.__name__ not in _NO_WORK:
            sizes = (each.nbytes for each in _tensors([tensors, result]) if each.device.type != "meta")
            if max(sizes, default=0) > self._limit:
                self.in_main_memory.add(f"{_caller()}: {func.__name__}")
        if here and func is not torch.Tensor.__setitem__:
            self._take(result)
        return result

    def _indexed(self, tensor: torch.Tensor, index: Any, value: Any = None) -> list[torch.Tensor]:
        """The tensors that must be in one place when `tensor` is indexed; without index tensors it is a mere copy."""
        indices = [*_tensors(index)]
        there = [] if self.holds(tensor) else indices
        return [tensor, *there, *(_tensors(value) if indices else [])]

    def _move(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to."""
        here, copy = self.holds(tensor), kwargs.pop("copy", False)
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                device, dtype = "cuda" if self.holds(arg) else "cpu", arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        there = here if device is None else torch.device(device).type == "cuda"
        moved = tensor.to(tensor.device, dtype or tensor.dtype, copy=copy or here != there)
        if there:
            self._take(moved)
        return moved

    def _take(self, result: Any) -> None:
        self.operations += 1
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage


def _caller() -> str:
    """The innermost function of qtool that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and "qtool" not in Path(frame.f_code.co_filename).parts[:-1]:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])
