"""One layer's tensors in a checkpoint, fetched with the checks that a reader owes its caller."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qtool.checkpoint.formats.scales import are_scales
from qtool.checkpoint.transposed import is_transposed
from qtool.errors import InputError
from qtool.scheme import QuantizationArgs

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint


class Stored:
    """A layer by its name without ".weight". Everything raises InputError for tensors that are missing or don't fit."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint = checkpoint
        self.name = name

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.checkpoint

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the int8 weight, from its header."""
        return self.shape_of("I8")

    def shape_of(self, dtype: str) -> tuple[int, int]:
        """(out, in) of the weight, which has this safetensors code, from its header."""
        info = self.checkpoint.info(f"{self.name}.weight")
        if info.dtype != dtype or len(info.shape) != 2:
            expected = {"I8": "int8"}.get(dtype, dtype)
            raise self.error(f"weight is {info.dtype} {list(info.shape)}, expected {expected} [out, in]")
        rows, columns = info.shape
        return (columns, rows) if self._is_transposed else (rows, columns)

    def weight(self) -> torch.Tensor:
        """int8 [out, in]."""
        return self._matrix(*self.shape)

    def numbers(self, args: QuantizationArgs) -> torch.Tensor:
        """The weight [out, in] as `args` have it: int8 in their range, or float8_e4m3fn without NaN."""
        if args.type == "float":
            import torch

            shape = self.shape_of("F8_E4M3")
            weight = self._matrix(*shape)
            if bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
                raise self.error("its weight holds NaN")
            return weight
        weight = self.weight()
        if args.num_bits < 8 and weight.numel():
            low, high = (int(extreme) for extreme in weight.aminmax())
            if low < args.qmin or high > args.qmax:
                raise self.error(f"its weight has integers from {low} to {high}, which don't fit {args.num_bits} bits")
        return weight

    def bias(self) -> torch.Tensor | None:
        """[out] as stored."""
        return self.checkpoint.tensor(f"{self.name}.bias") if self.has("bias") else None

    def vector(self, part: str, size: int) -> torch.Tensor:
        """A tensor of `size` numbers, whatever its axes of length 1; a single number is repeated."""
        tensor = self.checkpoint.tensor(f"{self.name}.{part}").reshape(-1)
        if tensor.numel() not in (1, size):
            raise self.error(f"{part} has {tensor.numel()} numbers, expected {size}")
        return tensor.expand(size).contiguous()

    def scale(self, part: str, size: int, *, signed: bool = False) -> torch.Tensor:
        """float32 [size], finite, and positive unless signed."""
        return self._checked(part, self.vector(part, size).float(), signed)

    def scales(
        self, part: str, args: QuantizationArgs, shape: tuple[int, int], *, signed: bool = False
    ) -> torch.Tensor:
        """float32, finite, and positive unless signed, of the shape that the scales of a weight (out, in) have."""
        scale = self.checkpoint.tensor(f"{self.name}.{part}").float()
        try:
            wanted = args.scales_shape(shape)
        except ValueError as error:
            raise self.error(str(error)) from None
        if scale.shape != wanted:
            raise self.error(f"{part} is {list(scale.shape)}, expected {list(wanted)}")
        return self._checked(part, scale, signed)

    def _checked(self, part: str, scale: torch.Tensor, signed: bool) -> torch.Tensor:
        if not are_scales(scale, signed=signed):
            raise self.error(f"{part} holds a number that is {'0 or not' if signed else 'not positive and'} finite")
        return scale

    def input_scale(self, size: int) -> float:
        """Of a tensor that holds it once, or `size` times."""
        value = self._constant("input_scale", size)
        if not (math.isfinite(value) and value > 0):
            raise self.error(f"input_scale is {value}, expected a positive number")
        return value

    def zero_point(self, part: str, size: int, args: QuantizationArgs) -> int:
        """An integer as `args` has them, of a tensor that holds it once, or `size` times."""
        value = self._constant(part, size)
        if not (value.is_integer() and args.qmin <= value <= args.qmax):
            raise self.error(f"{part} is {value}, expected an integer in {args.qmin}..{args.qmax}")
        return int(value)

    def no_zero_point(self, part: str, size: int) -> None:
        """Raises InputError unless that tensor is absent or all zeros (symmetric weights)."""
        if self.has(part) and bool(self.vector(part, size).any()):
            raise self.error(f"{part} is not zero: asymmetric weights are not supported")

    def error(self, what: str) -> InputError:
        return InputError(f"{self.name}: {what}", where=str(self.checkpoint.path))

    @property
    def _is_transposed(self) -> bool:
        """The file has the weight as [in, out]."""
        return is_transposed(self.checkpoint.config, self.name)

    def _matrix(self, out_size: int, in_size: int) -> torch.Tensor:
        weight = self.checkpoint.tensor(f"{self.name}.weight")
        if self._is_transposed:
            return weight.view(in_size, out_size).t().contiguous()
        return weight.view(out_size, in_size)

    def _constant(self, part: str, size: int) -> float:
        vector = self.vector(part, size)
        if bool((vector != vector[0]).any()):
            raise self.error(f"{part} differs per channel, where one number for the whole tensor is expected")
        return float(vector[0])
