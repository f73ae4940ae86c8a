"""The float model's decoder layers on all calibration samples, from one file of states to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qtool.model.activations import Activations, Resident
from qtool.model.caches import refuse
from qtool.model.decoder import DecoderStream
from qtool.model.experts import Handler
from qtool.model.observe import observe
from qtool.model.state import Batch, State
from qtool.model.statefile import StateFile
from qtool.model.weights import largest, refuse_damage, refuse_large
from qtool.quant.cache import CacheStatistics
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

    def run(
        self,
        layer: nn.Module,
        statistics: Mapping[str, InputStatistics],
        experts: Handler | None = None,
        caches: Mapping[str, CacheStatistics] | None = None,
    ) -> None:
        """Run the layer on all samples; what enters the linears that `statistics` names is counted.

        Args:
            experts: takes the place of the layer's routed experts.
            caches: count the keys and values of the attention modules of these names.

        Raises InputError when activations can't be true: the weights before them are damaged.
        """
        name, start = self.model.layer_name(self.index), 0
        check = _Check(self.model)
        for batch in observe(self.model, self.index, layer, self._batches(), statistics, experts, caches):
            check.add(name, batch.state)
            self.leaving.write(start, batch.state)
            start += len(batch.ids)
        for linear, seen in statistics.items():
            check.add(f"{name}.{linear}", (seen.amax,))
        check.finish()
        if any(seen.keys is None for seen in (caches or {}).values()):
            raise refuse(name, str(self.model.checkpoint.path / "config.json"))

    def runs(self, layer: nn.Module) -> list[Callable[[], torch.Tensor]]:
        """For each sample a call of the layer on it, of a decoder that hands on hidden states and nothing else."""
        batch = Batch(self.ids, self.hidden.read(0, len(self.ids)))
        return [partial(self._output, layer, sample) for sample in batch.split(1)]

    def add(self, sums: Activations | Resident) -> None:
        """Add what the layer's experts give to the hidden states that leave the layer. Raises InputError as `run`."""
        length, check = self.ids.shape[1], _Check(self.model)
        places = [*self._samples()]
        for rows, (hidden, *others) in zip(places, self.leaving.reads(places), strict=True):
            output, added = (
                each.reshape(-1, sums.width).to(self.model.device)
                for each in (hidden, sums.read(rows.start * length, rows.stop * length))
            )
            output = output.float() + added
            check.add(self.model.layer_name(self.index), (output,))
            self.leaving.write(rows.start, (output.reshape(hidden.shape), *others))
        check.finish()

    def pass_on(self) -> None:
        """What leaves a layer that text doesn't go through is what enters it."""
        for rows in self._samples():
            self.leaving.write(rows.start, self.hidden.read(rows.start, rows.stop))

    def _output(self, layer: nn.Module, batch: Batch) -> torch.Tensor:
        return self.model.run(self.index, layer, batch).hidden

    def _samples(self) -> Iterator[slice]:
        step, count = max(1, self.batch_tokens // self.ids.shape[1]), len(self.ids)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def _batches(self) -> Iterator[Batch]:
        places = [*self._samples()]
        for rows, state in zip(places, self.hidden.reads(places), strict=True):
            yield Batch(self.ids[rows], state, range(rows.start, rows.stop))


class _Check:
    """Refuses activations that can't be true: at once, but on a device only at the end, so that it isn't waited for."""

    def __init__(self, model: DecoderStream) -> None:
        self._weights, self._at_once = model.weights, model.device.type == "cpu"
        self._found: list[tuple[str, torch.Tensor]] = []

    def add(self, name: str, state: State) -> None:
        """What a layer or linear of this name gives or takes."""
        for tensor in state:
            if tensor.is_floating_point():
                if self._at_once:
                    refuse_damage(tensor, name, self._weights)
                else:
                    self._found.append((name, largest(tensor).float()))

    def finish(self) -> None:
        names = [name for name, _ in self._found]
        sizes = torch.stack([size for _, size in self._found]).tolist() if names else []
        for name, size in zip(names, sizes, strict=True):
            refuse_large(size, name, self._weights)


class Replay:
    """Takes the place of a layer's experts, and gives what they gave before.

    Args:
        sums: the output of all of them, per token in the order in which the layer sees them.
    """

    def __init__(self, sums: Activations | Resident) -> None:
        self._sums, self._tokens = sums, 0

    def __call__(self, hidden: torch.Tensor, _chosen: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        start = self._tokens
        self._tokens += len(hidden)
        return self._sums.read(start, self._tokens).to(hidden)
