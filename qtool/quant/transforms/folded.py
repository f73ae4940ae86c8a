"""Diagonals, folded into the weights around them."""

from __future__ import annotations

import torch

from qtool.quant.topology import Group
from qtool.quant.weights import Weights


class Folded:
    """A layer's parameters with diagonals folded in, computed as they are read.

    Attributes:
        changed: new values of norm gains and biases, float32, by name.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._columns: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self.changed: dict[str, torch.Tensor] = {}

    @property
    def linears(self) -> set[str]:
        """The linears whose weights differ from the original ones."""
        return {*self._columns, *self._rows}

    def shape(self, linear: str) -> tuple[int, int]:
        return self._weights.shape(linear)

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        weight = self._weights.rows(linear, start, stop)
        if linear in self._columns:
            weight = weight * self._columns[linear]
        if linear in self._rows:
            weight = weight * self._rows[linear][start:stop, None]
        return weight

    def vector(self, name: str) -> torch.Tensor | None:
        return self.changed[name] if name in self.changed else self._weights.vector(name)

    def columns(self, linear: str) -> torch.Tensor | None:
        """The smoothing scale of a linear's input, float32 [in], if any."""
        return self._columns.get(linear)

    def row_factors(self, linear: str) -> torch.Tensor | None:
        """What each channel of a linear's output is multiplied by, float32 [out], if anything."""
        return self._rows.get(linear)

    def fold(self, group: Group, s: torch.Tensor, dtype: torch.dtype) -> None:
        """Multiply the group's weights by s [in] per input channel, and divide what produces its input by it.

        Where that is a norm, its gain must survive storage in `dtype`: the weights take up what rounding it loses.
        """
        target = group.fold
        if target is None:
            raise ValueError(f"{group.linears} has no producer to fold into")
        channels = target.channel_map.to(s.device)
        gain = self.vector(f"{target.producer}.weight")  # None for a linear, whose weight is no vector
        width = self.shape(target.producer)[0] if gain is None else len(gain)
        if gain is not None:
            old = (gain + target.gain_offset)[channels]
            kept = (old / s - target.gain_offset).to(dtype).float() + target.gain_offset
            s = torch.where((old == 0) | (kept == 0), s, old / kept)
        inverse = torch.ones(width, device=s.device)
        inverse[channels] = 1 / s
        if gain is None:
            self._rows[target.producer] = self._rows.get(target.producer, 1) * inverse
        else:
            folded = (gain + target.gain_offset) * inverse - target.gain_offset
            self.changed[f"{target.producer}.weight"] = folded.to(dtype).float()
        bias = self.vector(f"{target.producer}.bias")
        if bias is not None:
            self.changed[f"{target.producer}.bias"] = bias * inverse
        for name in group.linears:
            self._columns[name] = s
