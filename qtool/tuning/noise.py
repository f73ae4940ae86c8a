"""What the noise of quantized linears does to the model's output, token by token, and what becomes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch


class Tally:
    """g·δ of quantized linears.

    Attributes:
        products: per linear, in lots that are the same for all: [draws · tokens] together.
    """

    def __init__(self) -> None:
        self.products: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._errors: defaultdict[str, float] = defaultdict(float)
        self._sizes: defaultdict[str, float] = defaultdict(float)

    def count(self, name: str, noise: torch.Tensor, output: torch.Tensor) -> None:
        """A linear's noise δ, and its float output."""
        self._errors[name] += float(noise.square().sum())
        self._sizes[name] += float(output.square().sum())

    def add(self, name: str, products: torch.Tensor) -> None:
        """g·δ of some tokens [n]."""
        self.products[name].append(products)

    def of(self, names: Sequence[str]) -> tuple[float, float]:
        """(relative error, KL per token) of these linears quantized together."""
        together = sum(torch.cat(self.products[name]) for name in names)
        assert isinstance(together, torch.Tensor)
        error, size = sum(self._errors[n] for n in names), sum(self._sizes[n] for n in names)
        return error / max(size, 1e-30), float(together.square().mean()) / 2
