"""The float model's decoder layers on all calibration tokens, from one file of activations to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qtool.model.activations import Activations
from qtool.model.decoder import DecoderStream
from qtool.model.experts import Handler
from qtool.model.observe import observe
from qtool.model.weights import refuse_damage
from qtool.quant.statistics import InputStatistics


@dataclass(frozen=True)
class FloatPass:
    """One layer's, while that is loaded.

    Attributes:
        model: the float model.
        index: the layer's number.
        length: tokens of a sample; samples lie one after the other.
        batch_tokens: how many tokens go through a layer at a time.
        hidden: what enters the layer.
        leaving: takes what leaves it.
    """

    model: DecoderStream
    index: int
    length: int
    batch_tokens: int
    hidden: Activations
    leaving: Activations

    def run(self, layer: nn.Module, statistics: Mapping[str, InputStatistics], experts: Handler | None = None) -> None:
        """Run the layer on all samples; what enters the linears that `statistics` names is counted.

        Args:
            experts: takes the place of the layer's routed experts.

        Raises InputError when activations can't be true: the weights before them are damaged.
        """
        name, weights, start = self.model.layer_name(self.index), self.model.weights, 0
        for batch in observe(self.model, self.index, layer, self._batches(), statistics, experts):
            output = batch.reshape(-1, self.hidden.width)
            refuse_damage(output, name, weights)
            self.leaving.write(start, output)
            start += len(output)
        for linear, seen in statistics.items():
            refuse_damage(seen.amax, f"{name}.{linear}", weights)

    def runs(self, layer: nn.Module) -> list[Callable[[], torch.Tensor]]:
        """For each sample a call of the layer on it."""
        inputs = self.hidden.read(0, self.hidden.rows).reshape(-1, self.length, self.hidden.width)
        return [partial(self.model.run, self.index, layer, inputs[row : row + 1]) for row in range(len(inputs))]

    def add(self, sums: Activations) -> None:
        """Add what the layer's experts give to what leaves the layer. Raises InputError as `run`."""
        for start in range(0, self.leaving.rows, self.batch_tokens):
            stop = min(start + self.batch_tokens, self.leaving.rows)
            output, added = (each.read(start, stop).to(self.model.device) for each in (self.leaving, sums))
            output = output.float() + added
            refuse_damage(output, self.model.layer_name(self.index), self.model.weights)
            self.leaving.write(start, output)

    def _batches(self) -> Iterator[torch.Tensor]:
        """[samples, length, hidden], whole samples."""
        rows = max(1, self.batch_tokens // self.length) * self.length
        for start in range(0, self.hidden.rows, rows):
            batch = self.hidden.read(start, min(start + rows, self.hidden.rows))
            yield batch.reshape(-1, self.length, self.hidden.width)
