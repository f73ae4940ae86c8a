"""The description of a quantized tensor and of a quantized linear, in the terms of compressed-tensors.

Field names and meanings are those of compressed-tensors 0.17 (quantization/quant_args.py), so that a description can be
written to and read from a checkpoint's config.json as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["tensor", "channel", "token", "group", "block"]


@dataclass(frozen=True, kw_only=True)
class QuantizationArgs:
    """How one tensor is quantized.

    Attributes:
        num_bits: of each element.
        type: integers, or floating point.
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
        """The least integer."""
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def steps(self) -> int:
        """How many steps lie between the least and the largest integer."""
        return self.qmax - self.qmin

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight of `shape` (out, in). Raises ValueError where the groups don't fit."""
        out, width = shape
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "group":
            assert self.group_size is not None
            if width % self.group_size:
                raise ValueError(f"{width} input channels are no whole number of groups of {self.group_size}")
            return (out, width // self.group_size)
        if self.strategy == "block":
            assert self.block_structure is not None
            rows, columns = self.block_structure
            return (-(-out // rows), -(-width // columns))
        return (out,)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of `shape` (out, in) without waste, with its float32 scales."""
        return -(-math.prod(shape) * self.num_bits // 8) + 4 * math.prod(self.scales_shape(shape))


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
    def label(self) -> str:
        """For people: "W8A8 static", "W4A16 in groups of 128"."""
        mode = "" if self.activations is None else " dynamic" if self.activations.dynamic else " static"
        groups = f" in groups of {self.weights.group_size}" if self.weights.group_size else ""
        return f"{self.bits}{mode}{groups}"

    @property
    def bits(self) -> str:
        """For people: "W8A8"; float activations count as 16."""
        return f"W{self.weights.num_bits}A{self.activations.num_bits if self.activations else 16}"
