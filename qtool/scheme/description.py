"""The description of a quantized tensor and of a quantized linear, in the terms of compressed-tensors.

Field names and meanings are those of compressed-tensors 0.17 (quantization/quant_args.py), so that a description can be
written to and read from a checkpoint's config.json as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["tensor", "channel", "token", "group", "block"]


_LARGEST_FLOAT = {8: 448}  # e4m3


@dataclass(frozen=True, kw_only=True)
class QuantizationArgs:
    """How one tensor is quantized.

    Attributes:
        num_bits: of each element.
        type: integers, or floating point: of 8 bits e4m3, which torch calls float8_e4m3fn.
        symmetric: the zero point is 0.
        strategy: what shares a scale: the whole tensor, an output channel, a token, a group of `group_size` input
            channels of one output channel, or a block of rows and columns.
        group_size: for `group`.
        block_structure: rows and columns, for `block`.
        dynamic: scales are found at run time.
    """

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.block_structure is not None:  # JSON makes a list of it
            object.__setattr__(self, "block_structure", tuple(self.block_structure))
        if (self.group_size is not None) != (self.strategy == "group"):
            raise ValueError(f"strategy {self.strategy} with group_size {self.group_size}")
        if (self.block_structure is not None) != (self.strategy == "block"):
            raise ValueError(f"strategy {self.strategy} with block_structure {self.block_structure}")

    @property
    def qmin(self) -> int:
        """The least number that can be stored."""
        return -_LARGEST_FLOAT[self.num_bits] if self.type == "float" else -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        """The largest one."""
        return _LARGEST_FLOAT[self.num_bits] if self.type == "float" else (1 << (self.num_bits - 1)) - 1

    @property
    def steps(self) -> int:
        """Their distance, which a symmetric range is spread over: of integers, how many steps lie between them."""
        return self.qmax - self.qmin

    @property
    def columns(self) -> int | None:
        """How many neighbouring input channels share a scale; None for all of them."""
        return self.block_structure[1] if self.block_structure is not None else self.group_size

    @property
    def rows(self) -> int:
        """How many neighbouring output channels share a scale, where not all of them do."""
        return self.block_structure[0] if self.block_structure is not None else 1

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight of `shape` (out, in). Raises ValueError where the groups don't fit."""
        out, width = shape
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "group":
            assert self.group_size is not None
            if width % self.group_size:
                raise ValueError(f"{width} input channels are not a whole number of groups of {self.group_size}")
            return (out, width // self.group_size)
        if self.strategy == "block":
            assert self.block_structure is not None
            rows, columns = self.block_structure
            return (-(-out // rows), -(-width // columns))
        return (out,)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of `shape` (out, in) without waste, with its float32 scales and its zero points."""
        scales = math.prod(self.scales_shape(shape))
        zero_points = 0 if self.symmetric else scales
        return -(-(math.prod(shape) + zero_points) * self.num_bits // 8) + 4 * scales


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantized.

    Attributes:
        weights: of its weight.
        activations: of its input; None leaves it float.
    """

    weights: QuantizationArgs
    activations: QuantizationArgs | None

    @property
    def is_static(self) -> bool:
        """The input's scale is fixed in calibration."""
        return self.activations is not None and not self.activations.dynamic

    @property
    def has_signed_scales(self) -> bool:
        """A weight scale may be negative: -8 is further from 0 than 7, and can so be where the largest weight is.

        For integers without zero points beside float activations, whose runtimes multiply by the scale and nothing
        else. AutoRound 0.16 writes such scales (data_type/int.py, quant_tensor_sym), and so do ggml's Q4_0 blocks.
        """
        return self.activations is None and self.weights.type == "int" and self.weights.symmetric

    @property
    def label(self) -> str:
        """For people: "W8A8 static", "W4A16 in groups of 128"."""
        return " ".join(filter(None, (self.kind, self.shared)))

    @property
    def kind(self) -> str:
        """For people: the label without how many weights share a scale."""
        mode = ""
        if self.activations is not None:
            mode = " dynamic" if self.activations.dynamic else " static"
            mode += " asymmetric" if self.activations.dynamic and not self.activations.symmetric else ""
        if not self.weights.symmetric:
            mode += " with zero points"
        return f"{self.bits}{mode}"

    @property
    def shared(self) -> str:
        """For people: "in groups of 128"; empty where all of an output channel's weights have one scale."""
        if self.weights.block_structure is not None:
            return f"in blocks of {' x '.join(map(str, self.weights.block_structure))}"
        return f"in groups of {self.weights.group_size}" if self.weights.group_size else ""

    @property
    def bits(self) -> str:
        """For people: "W8A8" for integers, "FP8" for floating point; activations that are not quantized count as 16."""
        if self.weights.type == "float":
            return f"FP{self.weights.num_bits}{'A16' if self.activations is None else ''}"
        return f"W{self.weights.num_bits}A{self.activations.num_bits if self.activations else 16}"
