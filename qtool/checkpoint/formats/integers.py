"""What AutoGPTQ's and AutoAWQ's checkpoints have in common: a layer in `qweight`, `qzeros`, `scales`, and `g_idx`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.formats.base import (
    Description,
    Holding,
    HuggingFaceFiles,
    Inexpressible,
    PackedFormat,
    quantization_method,
)
from qtool.checkpoint.formats.packed import Columns
from qtool.checkpoint.formats.scales import check_scales
from qtool.errors import InputError
from qtool.scheme import W4A16, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint
    from qtool.quant.types import QuantizedLinear

_STRATEGIES = ("channel", "group")
_OUTSIDE = ("lm_head", "embed_tokens", "wte", "wpe", "embed_in", "embed_out", "word_embeddings")


class ColumnFormat(PackedFormat, HuggingFaceFiles, Holding):
    """Weights of 4 or 8 bits, float activations; read as a float model, and written from integers of a conversion.

    All quantized layers are of one scheme, which `scales` holds in float16 where that loses nothing.

    Attributes:
        written: numbers of bits that are written.
        has_zero_points: readers take any zero point, and not only the middle of the range.
    """

    is_float = True
    weight_parts = ("weight", "qweight")
    packed_parts = frozenset(("qweight", "qzeros", "scales", "g_idx"))
    parts = packed_parts | {"bias"}
    schemes: ClassVar[tuple[Scheme, ...]] = (W4A16,)
    written: ClassVar[tuple[int, ...]] = (4,)
    has_zero_points: ClassVar[bool] = False

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

    def expresses(self, scheme: Scheme) -> bool:
        weights = scheme.weights
        kind = (weights.type, scheme.activations)
        return (
            kind == ("int", None)
            and (weights.symmetric or self.has_zero_points)
            and weights.num_bits in self.written
            and weights.strategy in _STRATEGIES
        )

    def problems(self, schemes: Mapping[str, Scheme | None]) -> list[Inexpressible]:
        found = super().problems(schemes)
        several = {scheme for scheme in schemes.values() if scheme is not None}
        if len(several) > 1:
            labels = " and ".join(sorted(each.label for each in several))
            what = f"{self.name} has one scheme for all quantized layers, not {labels}"
            found.append(Inexpressible(what, hint="compressed-tensors has several"))
        return found

    def misfit(self, name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
        together = 32 // scheme.weights.num_bits
        if any(size % together for size in shape):
            return f"{self.name} has {together} numbers in a word, and {' x '.join(map(str, shape))} doesn't divide so"
        return None

    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        groups = math.prod(scheme.weights.scales_shape(shape))
        return scheme.weights.nbytes(shape) + groups * scheme.weights.num_bits // 8 + 4 * shape[1]

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        check_scales(name, linear)
        bits = linear.scheme.weights.num_bits
        scales = linear.weight_scale.float().reshape(len(linear.weight), -1).t().contiguous()
        half = scales.half()
        codes = linear.weight.t().to(torch.int32) + (1 << (bits - 1))
        zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.int32)
        if linear.weight_zero_point is not None:
            zeros += linear.weight_zero_point.reshape(len(linear.weight), -1).t()
        found = {
            **self.pack(codes, zeros, bits),
            "scales": half if bool((half.float() == scales).all()) else scales.to(dtype),
        }
        if linear.bias is not None:
            found["bias"] = linear.bias.to(dtype)
        return {f"{name}.{part}": tensor for part, tensor in found.items()}

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        (scheme,) = {scheme for scheme in schemes.values() if scheme is not None}
        kept = [name for name, each in schemes.items() if each is None and not name.endswith(_OUTSIDE)]
        size = scheme.weights.group_size
        settings = {
            "quant_method": self.name,
            "bits": scheme.weights.num_bits,
            "group_size": -1 if size is None else size,
        }
        return Description(settings | self.settings(kept), {})

    @abstractmethod
    def pack(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Tensors, by the last parts of their names, of codes int32 [in, out] and zeros int32 [groups, out]."""

    @abstractmethod
    def settings(self, kept: Sequence[str]) -> dict[str, Any]:
        """What config.json says besides; `kept` are linears of the decoder that stay float."""

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


def words(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 [...] of fields [..., 32 / bits], each below 2^bits."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    whole = (fields.to(torch.int64) << shifts).sum(dim=-1)
    return torch.where(whole < 1 << 31, whole, whole - (1 << 32)).to(torch.int32)
