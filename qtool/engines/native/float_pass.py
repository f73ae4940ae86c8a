"""The float model's decoder layers on all calibration samples, from one file of states to the next."""

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
from qtool.model.state import Batch, State
from qtool.model.statefile import StateFile
from qtool.model.weights import refuse_damage
from qtool.quant.statistics import InputStatistics


@dataclass(frozen=True)
class FloatPass:
    """One layer's, while that is loaded.

    Attributes:
        model: the float model.
        index: the layer's number.
        ids: the samples' tokens, int64 [samples, length].
        batch_tokens: how many tokens go through a layer at a time.
        hidden: what enters the layer.
        leaving: takes what leaves it.
    """

    model: DecoderStream
    index: int
    ids: torch.Tensor
    batch_tokens: int
    hidden: StateFile
    leaving: StateFile

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.ids.numel()

    def run(self, layer: nn.Module, statistics: Mapping[str, InputStatistics], experts: Handler | None = None) -> None:
        """Run the layer on all samples; what enters the linears that `statistics` names is counted.

        Args:
            experts: takes the place of the layer's routed experts.

        Raises InputError when activations can't be true: the weights before them are damaged.
        """
        name, weights, start = self.model.layer_name(self.index), self.model.weights, 0
        for batch in observe(self.model, self.index, layer, self._batches(), statistics, experts):
            self._refuse_damage(batch.state)
            self.leaving.write(start, batch.state)
            start += len(batch.ids)
        for linear, seen in statistics.items():
            refuse_damage(seen.amax, f"{name}.{linear}", weights)

    def runs(self, layer: nn.Module) -> list[Callable[[], torch.Tensor]]:
        """For each sample a call of the layer on it, of a decoder that hands on hidden states and nothing else."""
        batch = Batch(self.ids, self.hidden.read(0, len(self.ids)))
        return [partial(self._output, layer, sample) for sample in batch.split(1)]

    def add(self, sums: Activations) -> None:
        """Add what the layer's experts give to the hidden states that leave the layer. Raises InputError as `run`."""
        length = self.ids.shape[1]
        for rows in self._samples():
            hidden, *others = self.leaving.read(rows.start, rows.stop)
            output, added = (
                each.reshape(-1, sums.width).to(self.model.device)
                for each in (hidden, sums.read(rows.start * length, rows.stop * length))
            )
            output = output.float() + added
            self._refuse_damage((output,))
            self.leaving.write(rows.start, (output.reshape(hidden.shape), *others))

    def pass_on(self) -> None:
        """What leaves a layer that text doesn't go through is what enters it."""
        for rows in self._samples():
            self.leaving.write(rows.start, self.hidden.read(rows.start, rows.stop))

    def _output(self, layer: nn.Module, batch: Batch) -> torch.Tensor:
        return self.model.run(self.index, layer, batch).hidden

    def _refuse_damage(self, state: State) -> None:
        for tensor in state:
            if tensor.is_floating_point():
                refuse_damage(tensor, self.model.layer_name(self.index), self.model.weights)

    def _samples(self) -> Iterator[slice]:
        step, count = max(1, self.batch_tokens // self.ids.shape[1]), len(self.ids)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def _batches(self) -> Iterator[Batch]:
        for rows in self._samples():
            yield Batch(self.ids[rows], self.hidden.read(rows.start, rows.stop), range(rows.start, rows.stop))


class Replay:
    """Takes the place of a layer's experts, and gives what they gave before.

    Args:
        sums: the output of all of them, per token in the order in which the layer sees them.
    """

    def __init__(self, sums: Activations) -> None:
        self._sums, self._tokens = sums, 0

    def __call__(self, hidden: torch.Tensor, _chosen: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        start = self._tokens
        self._tokens += len(hidden)
        return self._sums.read(start, self._tokens).to(hidden)
