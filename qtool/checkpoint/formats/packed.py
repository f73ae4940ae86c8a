"""Weights that lie packed in a checkpoint, as the float numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class PackedWeight(Protocol):
    """One weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Some rows, float32 [stop - start, in]."""
        ...


@dataclass(frozen=True)
class Columns:
    """Integers with scales and zero points for groups of input channels, output channels along the last axis.

    Attributes:
        codes: uint8 [in, out].
        zeros: the integer that stands for 0, uint8 [groups, out].
        scales: float [groups, out].
        groups: of each input channel, int64 [in].
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        width, out = self.codes.shape
        return out, width

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """(code - zero) · scale, float32 [stop - start, in]."""
        rows = slice(start, stop)
        zeros, scales = (each[:, rows].float()[self.groups] for each in (self.zeros, self.scales))
        return (self.codes[:, rows].float() - zeros).mul_(scales).t().contiguous()
