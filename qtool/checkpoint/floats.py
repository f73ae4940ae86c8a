"""A model's tensors as numbers to compute with, however they are stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from qtool.checkpoint import dtypes, formats, fp8
from qtool.checkpoint.formats import mxfp4
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.summary import float_dtype
from qtool.checkpoint.transposed import has_transposed, is_transposed
from qtool.errors import InputError

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.formats.packed import PackedWeight
    from qtool.checkpoint.reader import Checkpoint
    from qtool.quant.types import QuantizedCache, QuantizedLinear


class FloatReader:
    """Reads float tensors, whole or row by row: float32, float16, bfloat16, block-scaled FP8, FP4 or packed integers.

    Every number that it hands out is finite, but for those of `linear`.

    Args:
        checkpoint: of a format whose `is_float` is set; of another, `linear` tells which tensors can't be read here.
        device: where `tensor` and `rows` put what they read, and compute; all else is in main memory.
        as_float: read as the float model that is to be quantized: `linear` knows of no quantization.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu", *, as_float: bool = False) -> None:
        self._as_float = as_float
        self.checkpoint = checkpoint
        self._device = device
        self._on_cpu = str(device) == "cpu"
        self._format = formats.of(checkpoint)
        self._block = (
            fp8.block_shape(checkpoint.config, str(checkpoint.path / "config.json"))
            if self._format.name == fp8.METHOD
            else None
        )
        self._fused = mxfp4.fused(checkpoint)
        self._sound: set[str] = set()  # tensors of which every number has been found finite, on a device
        # To be looked at later, where that is wanted: the least and the largest number of each.
        self._doubts: list[tuple[str, torch.Tensor, torch.Tensor]] | None = None
        self._any_transposed = has_transposed(checkpoint.config)
        self._held: dict[str, torch.Tensor] = {}
        self._held_packed: dict[str, PackedWeight] = {}
        self._last: tuple[str, PackedWeight] | None = None

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block these tensors are kept on the device as they are stored, so that no file is read twice."""
        saved = self._held, self._held_packed
        layers = {name: self._packed(name) for name in names if name not in self._fused}
        held = {name: self._stored(name) for name, layer in layers.items() if layer is None}
        packed = {layer: self._packing.packed(self.checkpoint, layer) for layer in layers.values() if layer}
        self._held, self._held_packed = saved[0] | held, saved[1] | packed
        del held, packed
        try:
            yield
        finally:
            self._held, self._held_packed = saved

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block a device is not waited for to tell whether each tensor is finite; when it ends, for all.

        Raises InputError then, for the first that is not. In main memory every tensor is looked at when it is read.
        """
        if self._on_cpu or self._doubts is not None:
            yield
            return
        doubts: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._doubts = doubts
        try:
            yield
        except (InputError, ValueError):  # damage shows elsewhere first, where nobody knows what it comes from
            self._tell(doubts)
            raise
        finally:
            self._doubts = None
        self._tell(doubts)

    def _tell(self, doubts: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        import torch

        if not doubts:
            return
        ends = [end for _, *both in doubts for end in both]
        # Each type by itself: a number must not become infinite in another.
        flags = {
            dtype: iter(torch.stack([end for end in ends if end.dtype == dtype]).isfinite().tolist())
            for dtype in {end.dtype for end in ends}
        }
        for name, low, high in doubts:
            if not (next(flags[low.dtype]) and next(flags[high.dtype])):
                raise self._damaged(name)

    @property
    def where(self) -> str:
        """The checkpoint's folder, for messages."""
        return str(self.checkpoint.path)

    @cached_property
    def names(self) -> list[str]:
        """Of the float model's tensors, in the order in which the bytes lie in the files.

        What only says how to read another one isn't among them: the scales of an FP8 weight. A packed weight has the
        name that it would have in a float model.
        """
        named = (self._float_name(name) for name in self.checkpoint.names)
        return [
            name
            for name in named
            if name is not None
            and not (name.endswith(fp8.SCALE_SUFFIX) and name.removesuffix(fp8.SCALE_SUFFIX) in self.checkpoint)
        ]

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint or name in self._fused or self._packed(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises InputError when there is no such tensor."""
        if layer := self._packed(name):
            return self._packing.packed_shape(self.checkpoint, layer)
        if name in self._fused:
            return mxfp4.shape(self.checkpoint, name)
        info, owner = self.checkpoint.info(name), name.removesuffix(".weight")
        if info.dtype == "I8" and owner != name and isinstance(self._format, formats.QuantizedFormat):
            scheme = self._format.scheme(self.checkpoint, owner)
            if scheme is not None:  # a byte may hold two of its integers
                return self._format.shape(Stored(self.checkpoint, owner), scheme)
        shape = tuple(info.shape)
        return shape[::-1] if self._is_transposed(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor in the float model: as stored, or bfloat16 where it is FP8.

        Raises InputError unless it is a float.
        """
        import torch

        if self._packed(name) or name in self._fused:
            return self._packed_dtype
        info = self.checkpoint.info(name)
        if info.dtype == "F8_E4M3" and self._block is not None:
            return torch.bfloat16
        dtype = dtypes.to_torch(info.dtype)
        if dtype is None or info.dtype not in dtypes.FLOATS:
            raise InputError(
                f"tensor {name} has dtype {info.dtype}, expected a float type",
                where=str(info.file),
                hint="if the model is quantized, its config.json or description file doesn't say how",
            )
        return dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the float model."""
        if layer := self._packed(name):
            return math.prod(self._packing.packed_shape(self.checkpoint, layer)) * self._packed_dtype.itemsize
        if name in self._fused:
            return math.prod(mxfp4.shape(self.checkpoint, name)) * self._packed_dtype.itemsize
        info = self.checkpoint.info(name)
        is_fp8 = info.dtype == "F8_E4M3" and self._block is not None
        return info.nbytes * (2 if is_fp8 else 1)  # a byte becomes a bfloat16

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor.

        Args:
            dtype: to hand it out in; None is its type of the float model. What is FP8 is rounded once, to this.

        Raises:
            InputError: no such tensor, no float, NaN or infinite values, FP8 scales that are missing or don't fit.
        """
        import torch

        own = self.dtype(name)
        dtype = dtype or own
        if not self._is_coded(name):
            whole = self.finite(name, self._held[name] if name in self._held else self._stored(name))
            self._know_sound(name)
            whole = whole.to(dtype)
            return whole.t().contiguous() if self._is_transposed(name) else whole
        shape, step = self.shape(name), self.row_step(name)
        whole = torch.empty(shape, dtype=dtype, device=self._device)
        for start in range(0, shape[0], step):
            whole[start : start + step] = self.rows(name, start, min(start + step, shape[0]))
        self._know_sound(name)
        return whole

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, in] of a matrix in float32. Raises InputError as `tensor`."""
        self.dtype(name)
        if layer := self._packed(name):
            return self.finite(name, self._unpacked(layer).dequantize(start, stop).to(self._device))
        if name in self._fused:
            return self.finite(name, mxfp4.read(self.checkpoint, name, start, stop).to(self._device))
        info = self.checkpoint.info(name)
        if self._is_transposed(name):
            whole = self._held[name] if name in self._held else self._stored(name)
            return self.finite(name, whole.t()[start:stop].contiguous()).float()
        if info.dtype != "F8_E4M3":
            return self.finite(name, self._range(name, start, stop)).float()
        assert self._block is not None
        height = self._block[0]
        first = start - start % height  # of the block that `start` lies in
        scale_name = name + fp8.SCALE_SUFFIX
        self._check_scales(name, scale_name)
        scales = self.finite(scale_name, self._read(scale_name, first // height, -(-stop // height)))
        codes = self._range(name, first, stop)
        return self.finite(name, fp8.dequantize(codes, scales, self._block)[start - first :])

    def gather(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] of a matrix by their numbers, int64 [n], in its type of the float model.

        Raises InputError as `tensor`, or when there is no such row.
        """
        import torch

        if not self._on_cpu:
            return FloatReader(self.checkpoint).gather(name, ids)
        own = self.dtype(name)
        if not self._is_coded(name):
            return self.finite(name, self.checkpoint.rows(name, ids))
        return torch.cat([self.rows(name, row, row + 1) for row in ids.tolist()]).to(own)

    def unchanged(self, name: str) -> torch.Tensor:
        """A tensor as the float model has it; what is neither a float nor a weight (a mask, positions) as it is stored.

        Raises InputError as `tensor`.
        """
        if not self._on_cpu:
            return FloatReader(self.checkpoint).unchanged(name)
        if self._packed(name) or name in self._fused:
            return self.tensor(name)
        info = self.checkpoint.info(name)
        # a single number may be a limit, and infinite
        is_number = (info.dtype in dtypes.FLOATS and bool(info.shape)) or name.endswith(".weight")
        if not is_number:
            return self.checkpoint.tensor(name)
        return self.tensor(name).t() if self._is_transposed(name) else self.tensor(name)

    def linear(self, name: str) -> QuantizedLinear | None:
        """A quantized linear by its name without ".weight"; None when it is float.

        Raises InputError for a quantization that qtool doesn't read, or tensors that don't fit together.
        """
        if self._as_float and name in self._layers:
            return None
        return self._format.read_linear(self.checkpoint, name)

    def cache(self, name: str) -> QuantizedCache | None:
        """How the keys and values of an attention module are kept, by its name; None where they stay float.

        Raises InputError as `linear`.
        """
        return None if self._as_float else self._format.read_cache(self.checkpoint, name)

    def row_step(self, name: str, elements: int = 1 << 22) -> int:
        """How many rows to read at a time for about so many elements, in whole blocks."""
        height = self._block[0] if self._block else 1
        row = math.prod(self.shape(name)[1:]) if name in self._fused else self.shape(name)[-1]
        return max(height, elements // max(1, row) // height * height)

    def _is_transposed(self, name: str) -> bool:
        """The file has the transpose of what is handed out."""
        owner, _, part = name.rpartition(".")
        return self._any_transposed and part == "weight" and is_transposed(self.checkpoint.config, owner)

    def _is_coded(self, name: str) -> bool:
        """The numbers are to be worked out, some rows at a time."""
        if self._packed(name) is not None or name in self._fused:
            return True
        return self.checkpoint.info(name).dtype == "F8_E4M3"

    def finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` itself. Raises InputError when it holds NaN or infinite values."""
        import torch

        # NaN is both its minimum and its maximum; one pass, no copy, a twentieth of isfinite's time
        if not tensor.numel() or name in self._sound:
            return tensor
        low, high = torch.aminmax(tensor)
        if self._doubts is not None:
            self._doubts.append((name, low, high))
        elif not (bool(low.isfinite()) and bool(high.isfinite())):
            raise self._damaged(name)
        return tensor

    def _know_sound(self, name: str) -> None:
        """Every number of it has been looked at, or will be when `together` ends, which nothing outlives otherwise."""
        if not self._on_cpu:
            self._sound |= {name, name + fp8.SCALE_SUFFIX}

    def _damaged(self, name: str) -> InputError:
        return InputError(
            f"tensor {name} holds NaN or infinite values",
            where=str(self.checkpoint.info(name).file if name in self.checkpoint else self.checkpoint.path),
            hint="download the model again or repair the tensor; quantizing it would spread the damage",
        )

    @cached_property
    def _layers(self) -> frozenset[str]:
        """Those whose weights are packed, by their names without ".weight"."""
        format, checkpoint = self._format, self.checkpoint
        if not isinstance(format, formats.PackedFormat):
            return frozenset()
        owners = {
            name.rpartition(".")[0] for name in checkpoint.names if name.rpartition(".")[2] in format.weight_parts
        }
        return frozenset(owner for owner in owners if format.is_packed(checkpoint, owner))

    @property
    def _packing(self) -> formats.PackedFormat:
        """For layers that are packed."""
        assert isinstance(self._format, formats.PackedFormat)
        return self._format

    def _float_name(self, name: str) -> str | None:
        """What a float model calls a tensor of this one; None where it has no such tensor."""
        for part in (mxfp4.BLOCKS, mxfp4.SCALES):
            if (stem := name.removesuffix(part)) != name and stem in self._fused:
                return stem if part == mxfp4.BLOCKS else None
        owner, _, part = name.rpartition(".")
        if part in self._format.cache_parts:
            return None
        if owner not in self._layers or part not in self._packing.packed_parts:
            return name
        return f"{owner}.weight" if part in self._format.weight_parts else None

    def _packed(self, name: str) -> str | None:
        """The layer whose packed weight a float model has by this name; None for other tensors."""
        owner, _, part = name.rpartition(".")
        return owner if part == "weight" and owner in self._layers else None

    @cached_property
    def _packed_dtype(self) -> torch.dtype:
        """What packed weights are in the float model: as most of the rest."""
        import torch

        code = float_dtype(self.checkpoint, self._layers)
        return (dtypes.to_torch(code) if code else None) or torch.bfloat16

    def _unpacked(self, layer: str) -> PackedWeight:
        if layer in self._held_packed:
            return self._held_packed[layer]
        if self._last is None or self._last[0] != layer:  # it is read in several pieces
            self._last = (layer, self._packing.packed(self.checkpoint, layer))
        return self._last[1]

    def _range(self, name: str, start: int, stop: int) -> torch.Tensor:
        held = self._held.get(name)
        return self._read(name, start, stop) if held is None else held[start:stop]

    def _stored(self, name: str) -> torch.Tensor:
        """A whole tensor as it is stored, on the device."""
        info = self.checkpoint.info(name)
        if self._on_cpu or not info.shape:
            return self.checkpoint.tensor(name).to(self._device)
        import torch

        # Piece by piece, so that the next is read while one is copied, from a buffer of their size that is used again.
        step = self.row_step(name)
        ends = [*range(step, info.shape[0], step), info.shape[0]]
        first = self._read(name, 0, ends[0])
        whole = torch.empty(info.shape, dtype=first.dtype, device=self._device)
        whole[: ends[0]] = first
        for start, stop in itertools.pairwise(ends):
            whole[start:stop] = self._read(name, start, stop)
        return whole

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as they are stored, on the device."""
        if self._on_cpu:
            return self.checkpoint.row_range(name, start, stop)
        import torch

        pinned = torch.cuda.is_available()
        return self.checkpoint.row_range(name, start, stop, pinned=pinned).to(self._device, non_blocking=pinned)

    def _check_scales(self, name: str, scale_name: str) -> None:
        assert self._block is not None
        info = self.checkpoint.info(name)
        if scale_name not in self.checkpoint:
            raise InputError(
                f"tensor {scale_name} is missing",
                where=str(self.checkpoint.path),
                hint=f"the FP8 weight {name} can't be read without its scales; download the model again",
            )
        wanted = tuple(-(-size // block) for size, block in zip(info.shape, self._block, strict=True))
        found = self.checkpoint.info(scale_name)
        if tuple(found.shape) != wanted or found.dtype not in dtypes.FLOATS:
            raise InputError(
                f"tensor {scale_name} is {found.dtype} {list(found.shape)}, expected float {list(wanted)}",
                where=str(found.file),
                hint=f"config.json says that blocks of {list(self._block)} share a scale",
            )
