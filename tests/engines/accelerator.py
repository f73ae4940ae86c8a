"""An accelerator for machines that have none: it computes as the CPU does, and refuses what CUDA refuses."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qtool
from qtool import transfers
from qtool.engines.native import device

CUDA = torch.device("cuda")
_PLACES = {  # what a tensor says about where it is
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
}
# Operations of torch that make a tensor without a kernel, or none at all.
_EMPTY = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted", "_unsafe_view"}
_EMPTY |= {"resize_", "set_", "lift_fresh", "_reshape_alias", "is_pinned", "_assert_tensor_metadata"}
# Those that only copy: allowed in main memory.
_COPIES = {"copy_", "clone", "_to_copy", "cat", "stack", "zeros", "zeros_like", "fill_", "zero_", "ones", "new_zeros"}
# Those that CUDA answers only once everything before them is done: their result's size depends on numbers.
_WAITED_FOR = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "bincount", "is_nonzero"}
_WAITED_FOR |= {"equal", "_linalg_check_errors"}

_TOTAL = 80 * 10**9  # bytes of its memory
_PACKAGE = Path(qtool.__file__).parent


@dataclass
class Counts:
    """What was asked of the device.

    Attributes:
        kernels: operations that compute there, by name; some of them are several kernels (a sort, a factorization).
        uploads, downloads: bytes of each copy to the device and back.
        waits: where the program waited for the device, as "file:function of qtool: operation"; not for `uploads`.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    uploads: list[int] = field(default_factory=list)
    downloads: list[int] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)


class Accelerator(TorchFunctionMode):
    """Within the block the device "cuda" has a memory of its own.

    Its tensors lie in main memory all the same, known by their storages, so that every number is the CPU's. Operations
    on tensors of both places raise as CUDA's do. Allowed are single numbers (0-dimensional tensors) and index tensors
    of main memory beside tensors of the device, and copies.

    Copies to main memory that are not waited for arrive when their event is waited for; until then there is rubbish.
    Torch's functions are refused where Python calls them; what these call inside is followed and counted as well.

    Args:
        limit: bytes; computing on tensors of more in main memory is noted.
        memory: bytes that are there, of 80 GB that it says it has; torch.OutOfMemoryError when more is wanted.
        has_float64: TypeError where it must compute in float64 otherwise.

    Attributes:
        counts: what ran on the device.
        peak: the most bytes of tensors that were there at once.
        in_main_memory: what computed on a large tensor in main memory, as "file:function of qtool: operation".
    """

    def __init__(self, limit: int = 1 << 20, memory: int | None = None, *, has_float64: bool = True) -> None:
        super().__init__()
        self.counts = Counts()
        self.in_main_memory: set[str] = set()
        self.peak = 0
        self._limit, self._memory, self._has_float64 = limit, memory, has_float64
        # Weak references keep no numbers, but see to it that no address is given out again.
        self._storages: dict[int, StorageWeakRef] = {}
        self._live: dict[int, int] = {}  # bytes of each that may be alive
        self._used = 0
        self._here: bool | None = None  # where the running function makes tensors, if it says so
        self._moving = False
        self._inner = _Inner(self)
        self._patch = pytest.MonkeyPatch()
        self._coming: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def operations(self) -> int:
        """How many ran on the device."""
        return self.counts.kernels.total()

    def __enter__(self) -> Self:
        self._patch.setattr(transfers, "asynchronous", lambda device: device.type == "cuda")
        self._patch.setattr(transfers, "mark", lambda _device: _Event(self._coming))
        self._patch.setattr(device, "_module", lambda _name: self)
        super().__enter__()
        self._inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        super().__exit__(*error)
        self._patch.undo()

    # ------------------------------------------------------------------ what torch.cuda has

    def device_count(self) -> int:
        return 8

    def mem_get_info(self) -> tuple[int, int]:
        """(free, in all)."""
        self._clear_away()
        return _TOTAL - self._used, _TOTAL

    def set_per_process_memory_fraction(self, share: float) -> None:
        self._memory = round(share * _TOTAL)

    def get_device_capability(self, _card: int = 0) -> tuple[int, int]:
        return (9, 0)

    # ------------------------------------------------------------------ what it does

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
        if func is torch.Tensor.tolist and self.holds(args[0]):
            self._download(args[0], "tolist")
        tensors = [*_tensors([args, kwargs])]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            tensors = self._indexed(*args)
        if func is not torch.Tensor.copy_ and any(map(self.holds, tensors)):
            for tensor in tensors:
                if tensor.dim() and not self.holds(tensor):
                    raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, cuda and cpu")
        if func is torch.Tensor.copy_ and self.holds(args[1]) and not self.holds(args[0]) and kwargs["non_blocking"]:
            self.counts.downloads.append(args[1].nbytes)
            return self._send(*args[:2])
        kwargs.pop("pin_memory", None)
        here = None
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu" if here else kwargs["device"]
        saved, self._here = self._here, here
        try:
            return func(*args, **kwargs)
        finally:
            self._here = saved

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation of those that every function consists of."""
        return func(*args, **kwargs)

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow such an operation, which gave `result`."""
        if self._moving:
            return
        name, given = func.overloadpacket.__name__, [*_tensors([args, kwargs])]
        held = [*map(self.holds, given)]
        here = (
            any(held) if given and not (name.startswith(("new_", "empty", "zeros")) and self._here is False) else False
        )
        here = here or (self._here is True and not any(held))
        if name == "copy_" and held[0] != held[1]:
            if held[0] or given[0].numel() > 1:
                self._copied(given[1], there=held[0], wait=not kwargs.get("non_blocking"))
            return
        views = func.is_view or name in _EMPTY
        if not here:
            sizes = (each.nbytes for each in [*given, *_tensors(result)] if each.device.type != "meta")
            if not views and name not in _COPIES and max(sizes, default=0) > self._limit:
                self.in_main_memory.add(f"{_caller()}: {name}")
            return
        if name in _WAITED_FOR or _is_masked(name, args):
            self.counts.waits[f"{_caller()}: {name}"] += 1
        if not views and name != "_local_scalar_dense":
            self.counts.kernels[name] += 1
        self._take(result)

    def _indexed(self, tensor: torch.Tensor, index: Any, value: Any = None) -> list[torch.Tensor]:
        """The tensors that must be in one place when `tensor` is indexed; without index tensors it is a mere copy."""
        indices = [*_tensors(index)]
        there = [] if self.holds(tensor) else indices
        return [tensor, *there, *(_tensors(value) if indices else [])]

    def _move(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to."""
        here, copy = self.holds(tensor), kwargs.pop("copy", False)
        place, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                place, dtype = "cuda" if self.holds(arg) else "cpu", arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            else:
                place = arg
        there = here if place is None else torch.device(place).type == "cuda"
        wait = not kwargs.get("non_blocking", False)
        saved, self._moving = self._moving, True
        try:
            moved = tensor.to(tensor.device, dtype or tensor.dtype, copy=copy or here != there)
        finally:
            self._moving = saved
        if here != there:
            self._copied(tensor, there=there, wait=wait)
        elif moved is not tensor and there:
            self.counts.kernels["_to_copy"] += 1
        elif moved is not tensor and moved.device.type != "meta" and max(moved.nbytes, tensor.nbytes) > self._limit:
            self.in_main_memory.add(f"{_caller()}: to")
        if there:
            self._take(moved)
        return moved

    def _copied(self, tensor: torch.Tensor, *, there: bool, wait: bool) -> None:
        """A copy to the device, or from it."""
        if there:
            self.counts.uploads.append(tensor.nbytes)
            return
        self.counts.downloads.append(tensor.nbytes)
        if wait:
            self.counts.waits[f"{_caller()}: copy"] += 1

    def _send(self, to: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            self._coming.append((to, tensor.clone()))
            to.view(torch.uint8).fill_(0x5A) if to.dim() else to.fill_(7)
        return to

    def _download(self, tensor: torch.Tensor, name: str) -> None:
        self.counts.downloads.append(tensor.nbytes)
        self.counts.waits[f"{_caller()}: {name}"] += 1

    def _take(self, result: Any) -> None:
        for tensor in _tensors(result):
            if tensor.dtype == torch.float64 and not self._has_float64:
                raise TypeError("this device has no float64")
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = StorageWeakRef(storage)
                self._live[storage._cdata] = storage.nbytes()
                self._used += storage.nbytes()
                if self._used > max(self.peak, self._memory or 0):
                    self._clear_away()
                    if self._memory is not None and self._used > self._memory:
                        self._live.pop(storage._cdata)
                        self._used -= storage.nbytes()
                        raise torch.OutOfMemoryError(f"CUDA out of memory. {self._memory} bytes are there")
                    self.peak = max(self.peak, self._used)

    def _clear_away(self) -> None:
        for number in [number for number in self._live if self._storages[number].expired()]:
            self._used -= self._live.pop(number)


class _Event:
    """After all that was sent until now."""

    def __init__(self, coming: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._coming = [*coming]
        coming.clear()

    def synchronize(self) -> None:
        for to, tensor in self._coming:
            to.copy_(tensor)
        self._coming = []


class _Inner(TorchDispatchMode):
    """Sees the operations inside of functions."""

    def __init__(self, owner: Accelerator) -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._owner.run(func, args, kwargs or {})
        self._owner.ran(func, args, kwargs or {}, result)
        return result


def _is_masked(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an element is chosen by a mask, whose true ones must be counted first."""
    return name in ("index", "index_put_", "index_put") and any(t.dtype == torch.bool for t in _tensors(args[1]))


def _caller() -> str:
    """The innermost function of qtool that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _PACKAGE not in Path(frame.f_code.co_filename).parents:
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
