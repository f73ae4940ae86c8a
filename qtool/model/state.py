"""What passes from one decoder layer to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """Some samples on their way through the decoder.

    Attributes:
        ids: their tokens, int64 [samples, length].
        state: what the last layer left of them, or what enters the first: tensors [samples, ...]. Most decoders have
            one tensor, the hidden states [samples, length, hidden]. Others have several streams, or hand further
            tensors from layer to layer; before their first layer there may be none.
        numbers: of the samples, among those that a calibration has; None for any other text.
    """

    ids: torch.Tensor
    state: State
    numbers: range | None = None

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states, of a decoder that hands on nothing else."""
        (hidden,) = self.state
        return hidden

    def split(self, samples: int) -> Iterator[Batch]:
        """Batches of so many samples, whose tensors are parts of these."""
        for start in range(0, len(self.ids), samples):
            rows = slice(start, start + samples)
            numbers = None if self.numbers is None else self.numbers[rows]
            yield Batch(self.ids[rows], tuple(tensor[rows] for tensor in self.state), numbers)

    def to(self, device: torch.device) -> Batch:
        state = tuple(tensor.to(device, non_blocking=device.type != "cpu") for tensor in self.state)
        return Batch(self.ids, state, self.numbers)

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """All samples of several batches."""
        states = zip(*(batch.state for batch in batches), strict=True)
        return cls(torch.cat([batch.ids for batch in batches]), tuple(torch.cat(parts) for parts in states))
