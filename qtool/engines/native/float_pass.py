"""The float model's decoder layers on all calibration tokens, from one file of activations to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qtool.model.activations import Activations
from qtool.model.decoder import DecoderStream
from qtool.model.weights import refuse_damage
from qtool.quant.statistics import InputStatistics


@dataclass(frozen=True)
class FloatPass:
    """Runs layers that are loaded.

    Attributes:
        model: the float model.
        samples, length: of the calibration text, which lies in activations sample after sample.
        batch_tokens: how many tokens go through a layer at a time.
    """

    model: DecoderStream
    samples: int
    length: int
    batch_tokens: int

    def run(
        self,
        index: int,
        layer: nn.Module,
        hidden: Activations,
        leaving: Activations,
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        """From `hidden` to `leaving`; what enters the linears that `statistics` names is counted.

        Raises InputError when activations can't be true: the weights before them are damaged.
        """
        name, weights = self.model.layer_name(index), self.model.weights
        batch = max(1, self.batch_tokens // self.length)
        with _observing(layer, statistics):
            for sample in range(0, self.samples, batch):
                start, stop = sample * self.length, min(sample + batch, self.samples) * self.length
                x = hidden.read(start, stop).reshape(-1, self.length, hidden.width).to(self.model.device)
                output = self.model.run(index, layer, x).reshape(-1, hidden.width)
                refuse_damage(output, name, weights)
                leaving.write(start, output)
        for linear, seen in statistics.items():
            refuse_damage(seen.amax, f"{name}.{linear}", weights)

    def runs(self, index: int, layer: nn.Module, hidden: Activations) -> list[Callable[[], torch.Tensor]]:
        """For each sample a call of the layer on it."""
        inputs = hidden.read(0, hidden.rows).reshape(self.samples, self.length, -1)
        return [partial(self.model.run, index, layer, inputs[row : row + 1]) for row in range(self.samples)]

    def add(self, index: int, sums: Activations, leaving: Activations) -> None:
        """Add what a layer's experts give to what leaves the layer. Raises InputError as `run`."""
        for start in range(0, leaving.rows, self.batch_tokens):
            stop = min(start + self.batch_tokens, leaving.rows)
            output = leaving.read(start, stop).float() + sums.read(start, stop)
            refuse_damage(output, self.model.layer_name(index), self.model.weights)
            leaving.write(start, output)


@contextmanager
def _observing(layer: nn.Module, statistics: Mapping[str, InputStatistics]) -> Iterator[None]:
    """Within the block, what enters the linears of these names is counted."""
    with ExitStack() as stack:
        for name, seen in statistics.items():
            hook = layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
            stack.callback(hook.remove)
        yield
