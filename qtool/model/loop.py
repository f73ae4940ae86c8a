"""The decoder layers, run one at a time, with the model's own forward around them.

The model of text runs as transformers wrote it, with layers that don't compute: they hand out what the true layers
gave. So prologue, masks, positions, what happens between layers and the epilogue are the model's own code, whatever
a layer is called with and whatever it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from qtool.model.loader import Loader
from qtool.model.skeleton import Skeleton
from qtool.model.state import Batch, State
from qtool.model.structure import mapped, tensors_in
from qtool.model.succession import Slot, Succession, learn
from qtool.model.textmodel import Call, Reached, TextModel, content_of, fill, hidden_states

# Stands for hidden states in a call.
_HIDDEN = torch.empty(0)


class DecoderLoop:
    """Calls the layers as the model's own forward does.

    Args:
        skeleton: of the model.
        loader: of its weights.

    Raises, here and later, InputError for a model whose layers can't be run one by one.
    """

    def __init__(self, skeleton: Skeleton, loader: Loader) -> None:
        self._skeleton, self._loader = skeleton, loader
        self._text = TextModel(skeleton, loader)
        self._templates: dict[tuple[torch.dtype, int], list[Call | None]] = {}

    # ------------------------------------------------------------------ what it is

    @cached_property
    def _learned(self) -> Succession:
        return learn(self._text, self._skeleton, self._loader)

    @property
    def is_plain(self) -> bool:
        """One tensor of hidden states passes from layer to layer, and nothing else depends on the tokens."""
        return self._learned.hidden is not None and not self._text.shown

    def show(self, calls: Sequence[Call]) -> None:
        """From now on samples are those of these calls of the model of text, by their numbers."""
        self._text.shown = calls

    @property
    def is_shown(self) -> bool:
        """`show` was called."""
        return bool(self._text.shown)

    def is_idle(self, index: int) -> bool:
        """Whether text doesn't go through this layer."""
        return index in self._learned.idle

    def is_called(self, index: int, linear: str) -> bool:
        """Whether text goes through a linear of a layer, by its name inside it."""
        return linear in self._learned.called.get(index, ())

    def sample_shapes(self, index: int, length: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(shape without the samples, type) of each tensor that enters layer `index`."""
        if self.is_plain:
            slots = self._moving(0)
        elif index == 0:
            return []
        else:
            slots = self._moving(index - 1)
        return [(tuple(slot.batch_first(1, length)[1:]), slot.small.dtype) for slot in slots]

    # ------------------------------------------------------------------ running it

    @torch.no_grad()
    def entering(self, ids: torch.Tensor, dtype: torch.dtype) -> State:
        """What enters the first layer, for token ids [samples, length]."""
        if not self.is_plain:
            return ()
        self._template(0, dtype, ids.shape[1])
        return (self._reach(0, Batch(ids, ()), dtype).values[self._learned.hidden],)

    @torch.no_grad()
    def call(self, index: int, batch: Batch, dtype: torch.dtype) -> Call:
        """What layer `index` is called with when the layer before it has left this."""
        if self.is_plain:
            template = self._template(index, dtype, batch.ids.shape[1])
            assert template is not None
            return template.exchanged(_HIDDEN, batch.hidden)
        return self._reach(index, batch, dtype)

    def left(self, index: int, call: Call, result: Any) -> State:
        """What layer `index` leaves, after it was called so and gave this."""
        left = self._learned.left[index]
        tensors = [*tensors_in(result)]
        for place in left.shared:
            tensors += tensors_in(content_of(call.values[place]))
        if len(tensors) != len(left.slots):
            raise self._skeleton.unusual("a layer returns now this, now that")
        return tuple(
            tensor.movedim(slot.batch or 0, 0) for tensor, slot in zip(tensors, left.slots, strict=True) if slot.moves
        )

    def leaving(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """What enters the output projection, [samples, length, hidden], when the last layer has left this."""

        def replay(index: int, call: Call) -> Any:
            return self._replayed(index, call, batch, batch.state if index == self._last else None)

        return hidden_states(self._text.run(batch.ids, replay, dtype, batch.numbers))

    # ------------------------------------------------------------------ how

    @cached_property
    def _last(self) -> int:
        return max(index for index in range(len(self._skeleton.layers)) if not self.is_idle(index))

    def before(self, index: int) -> int:
        """The layer whose output layer `index` gets; -1 for none."""
        return max((other for other in range(index) if not self.is_idle(other)), default=-1)

    def _moving(self, index: int) -> list[Slot]:
        index = index if not self.is_idle(index) else self.before(index)
        return [slot for slot in self._learned.left[index].slots if slot.moves] if index >= 0 else []

    def _reach(self, wanted: int, batch: Batch, dtype: torch.dtype) -> Call:
        before = self.before(wanted)

        def replay(index: int, call: Call) -> Any:
            if index == wanted:
                raise Reached(call)
            return self._replayed(index, call, batch, batch.state if index == before else None)

        try:
            self._text.run(batch.ids, replay, dtype, batch.numbers)
        except Reached as reached:
            return reached.call
        raise self._skeleton.unusual(f"layer {wanted} isn't called")

    def _replayed(self, index: int, call: Call, batch: Batch, state: State | None) -> Any:
        """The result of a layer whose state is known, or something of the same form; fills the containers."""
        left, device = self._learned.left[index], self._loader.device
        known = iter(state or ())

        def tensor(slot: Slot) -> torch.Tensor:
            if slot.batch is None:
                return slot.small
            if state is not None and slot.moves:
                return next(known).to(device).movedim(0, slot.batch)
            shape = slot.shape(*batch.ids.shape)
            return torch.zeros((), dtype=slot.small.dtype, device=device).expand(shape)

        result, shared = left.rebuilt(tensor(slot) for slot in left.slots)
        for place, content in shared.items():
            fill(call.values[place], content)
        return result

    def _template(self, index: int, dtype: torch.dtype, length: int) -> Call | None:
        """The call of a layer for texts of this length, with a mark in place of the hidden states."""
        key = (dtype, length)
        if key not in self._templates:
            calls: list[Call | None] = [None] * len(self._skeleton.layers)
            place = self._learned.hidden

            def note(index: int, call: Call) -> Any:
                hidden = call.values[place]
                calls[index] = call.exchanged(hidden, _HIDDEN)
                return mapped(self._learned.left[index].result, lambda _: hidden)

            self._text.run(self._text.any_text(1, length, 0), note, dtype)
            self._templates[key] = calls
        return self._templates[key][index]
