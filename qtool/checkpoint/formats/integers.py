"""What AutoGPTQ's and AutoAWQ's checkpoints have in common: a layer in `qweight`, `qzeros`, `scales`, and `g_idx`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.formats.base import PackedFormat, quantization_method
from qtool.checkpoint.formats.packed import Columns
from qtool.errors import InputError
from qtool.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint


class ColumnFormat(PackedFormat):
    """Weights of 4 or 8 bits, float activations; read as a float model."""

    is_float = True
    weight_parts = ("weight", "qweight")
    packed_parts = frozenset(("qweight", "qzeros", "scales", "g_idx"))

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return quantization_method(config) == self.name

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        return None

    def is_packed(self, checkpoint: Checkpoint, name: str) -> bool:
        return f"{name}.qweight" in checkpoint

    def packed(self, checkpoint: Checkpoint, name: str) -> Columns:
        import torch

        bits = self.bits(checkpoint)
        out, width = self.packed_shape(checkpoint, name)
        scales = checkpoint.tensor(f"{name}.scales")
        groups = len(scales)
        size = self._group_size(checkpoint, width)
        if checkpoint.info(f"{name}.scales").dtype not in FLOATS or tuple(scales.shape) != (-(-width // size), out):
            raise self._misfit(checkpoint, name, f"scales {list(scales.shape)} in groups of {size}")
        zeros = checkpoint.tensor(f"{name}.qzeros")
        if zeros.dtype != torch.int32 or tuple(zeros.shape) != (groups, out * bits // 32):
            raise self._misfit(checkpoint, name, f"qzeros {zeros.dtype} {list(zeros.shape)}")
        index = torch.arange(width) // size
        if f"{name}.g_idx" in checkpoint:
            index = checkpoint.tensor(f"{name}.g_idx").long()
            if tuple(index.shape) != (width,) or int(index.min()) < 0 or int(index.max()) >= groups:
                raise self._misfit(checkpoint, name, f"g_idx {list(index.shape)}")
        codes = self.unpack(checkpoint.tensor(f"{name}.qweight"), bits)
        return Columns(codes, self.unpack_zeros(checkpoint, zeros, bits), scales, index)

    @abstractmethod
    def unpack(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        """uint8 [in, out] of `qweight`."""

    @abstractmethod
    def unpack_zeros(self, checkpoint: Checkpoint, words: torch.Tensor, bits: int) -> torch.Tensor:
        """uint8 [groups, out] of `qzeros`."""

    def bits(self, checkpoint: Checkpoint) -> int:
        """Of each integer. Raises InputError for a number that isn't read."""
        found = self._setting(checkpoint, "bits")
        if found not in self.widths:
            raise InputError(
                f"{self.name} with {found!r} bits can't be read",
                where=str(checkpoint.path / "config.json"),
                hint=f"qtool reads {' and '.join(map(str, self.widths))} bits; quantize the original model",
            )
        return int(found)

    widths: ClassVar[tuple[int, ...]]

    def _group_size(self, checkpoint: Checkpoint, width: int) -> int:
        size = self._setting(checkpoint, "group_size")
        if not isinstance(size, int) or size == 0 or size < -1:
            raise InputError(f"{self.name} with group_size {size!r} can't be read", where=str(checkpoint.path))
        return width if size == -1 else size

    def _setting(self, checkpoint: Checkpoint, key: str) -> Any:
        return checkpoint.config["quantization_config"].get(key)

    def _words(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        info = checkpoint.info(f"{name}.qweight")
        if info.dtype != "I32" or len(info.shape) != 2:
            raise self._misfit(checkpoint, name, f"qweight {info.dtype} {list(info.shape)}")
        return info.shape[0], info.shape[1]

    def _misfit(self, checkpoint: Checkpoint, name: str, what: str) -> InputError:
        bits = self._setting(checkpoint, "bits")
        return InputError(
            f"{name}: {what} doesn't fit {self.name} with {bits} bits",
            where=str(checkpoint.path),
            hint="the checkpoint is damaged, or config.json belongs to another one; download it again",
        )


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., 32 / bits] of int32 words: their fields, the lowest first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
