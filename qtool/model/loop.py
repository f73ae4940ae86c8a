"""The model's own forward around its decoder layers.

The model of text runs as transformers wrote it, with layers that don't compute: they hand out what the true layers
gave. So prologue, masks, positions, what happens between layers and the epilogue are the model's own code, whatever
a layer is called with and whatever it returns.

What a layer leaves for the next one is learned once, on a few tokens: the tensors in its result, and what it puts into
a container that is handed from layer to layer (the shared keys and values of Gemma 3n and 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from qtool.errors import QtoolError, in_one_line
from qtool.model.experts import RoutedExperts, handled
from qtool.model.loader import Loader
from qtool.model.outside import Outside
from qtool.model.skeleton import Skeleton
from qtool.model.state import Batch, State
from qtool.model.structure import alike, mapped, tensors_in
from qtool.quant.topology import linear_layers, signature

_SAMPLES, _TOKENS = (2, 3), (8, 12)  # of the texts that the loop is learned on


@dataclass(frozen=True)
class Call:
    """What a layer is called with.

    Attributes:
        args, kwargs: as the model's own forward gives them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_tensors(self, change: Callable[[torch.Tensor], Any]) -> Call:
        return Call(mapped(self.args, change), mapped(self.kwargs, change))

    @property
    def values(self) -> dict[Any, Any]:
        """The arguments, by their places."""
        return {**dict(enumerate(self.args)), **self.kwargs}

    @property
    def containers(self) -> dict[Any, Any]:
        """Arguments that a layer could put something into, by their places."""
        return {place: value for place, value in self.values.items() if isinstance(value, MutableMapping | list)}


@dataclass(frozen=True)
class _Slot:
    """A tensor that a layer leaves, as seen on two texts of different sizes.

    Attributes:
        small, large: what it was.
        batch: the dimension of the samples; None for one that doesn't depend on the text.
        is_used: something after the layer depends on it (on attention scores, say, nothing does).
    """

    small: torch.Tensor
    large: torch.Tensor
    batch: int | None
    is_used: bool = True

    @property
    def moves(self) -> bool:
        """Whether it must be kept from one layer to the next."""
        return self.is_used and self.batch is not None

    @classmethod
    def of(cls, small: torch.Tensor, large: torch.Tensor) -> _Slot:
        batch = next(
            (d for d, sizes in enumerate(zip(small.shape, large.shape, strict=True)) if sizes == _SAMPLES), None
        )
        return cls(small, large, batch)

    def shape(self, samples: int, length: int) -> list[int]:
        """For a text of this size, [..., samples, ...]."""
        found = []
        for dimension, (small, large) in enumerate(zip(self.small.shape, self.large.shape, strict=True)):
            if dimension == self.batch:
                found.append(samples)
            else:
                # What grows with the text does so in proportion, at most with a constant besides.
                grown = (large - small) * (length - _TOKENS[0]) // (_TOKENS[1] - _TOKENS[0])
                found.append(small + grown)
        return found


@dataclass(frozen=True)
class _Left:
    """What a layer leaves.

    Attributes:
        result: what it returns, on the small text.
        shared: what is then in the containers, by their places in the call, on the small text.
        slots: of the tensors in both, in order.
    """

    result: Any
    shared: dict[Any, Any]
    slots: list[_Slot]

    def rebuilt(self, tensors: Iterator[torch.Tensor]) -> tuple[Any, dict[Any, Any]]:
        """Result and content of the containers, with these tensors."""
        result = mapped(self.result, lambda _: next(tensors))
        return result, {place: mapped(content, lambda _: next(tensors)) for place, content in self.shared.items()}


@dataclass(frozen=True)
class _Learned:
    """How the layers follow each other.

    Attributes:
        left: what each layer leaves.
        calls: of the layers, on the small text.
        hidden: the place of the hidden states in every call, where these alone pass from layer to layer and all other
            arguments depend on the text's length only; None for any other model.
        idle: layers that a text doesn't go through (cross-attention to pictures).
        called: per layer the linears that it goes through, by their names inside the layer.
    """

    left: list[_Left]
    calls: list[Call | None]
    hidden: Any
    idle: frozenset[int]
    called: dict[int, set[str]]


class Reached(Exception):
    """A layer, or the model of text, is called, and nothing after that matters."""

    def __init__(self, call: Call) -> None:
        self.call = call


class DecoderLoop:
    """Calls the layers as the model's own forward does.

    Args:
        skeleton: of the model.
        loader: of its weights.

    Raises, here and later, InputError for a model whose layers can't be run one by one.
    """

    def __init__(self, skeleton: Skeleton, loader: Loader) -> None:
        self._skeleton, self._loader = skeleton, loader
        self._outside: dict[torch.dtype, Outside] = {}
        self._called: dict[int, set[str]] = {}
        self._templates: dict[tuple[torch.dtype, int], list[Call | None]] = {}
        self._shown: Sequence[Call] = ()

    # ------------------------------------------------------------------ what it is

    @property
    def is_plain(self) -> bool:
        """One tensor of hidden states passes from layer to layer, and nothing else depends on the tokens."""
        return self._learned.hidden is not None and not self._shown

    def show(self, calls: Sequence[Call]) -> None:
        """From now on samples are those of these calls of the model of text, by their numbers."""
        self._shown = calls

    @property
    def is_shown(self) -> bool:
        """`show` was called."""
        return bool(self._shown)

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
        return [(tuple(_batch_first(slot, 1, length)[1:]), slot.small.dtype) for slot in slots]

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
            return _exchanged(template, _HIDDEN, batch.hidden)
        return self._reach(index, batch, dtype)

    def left(self, index: int, call: Call, result: Any) -> State:
        """What layer `index` leaves, after it was called so and gave this."""
        left = self._learned.left[index]
        tensors = [*tensors_in(result)]
        for place in left.shared:
            tensors += tensors_in(_content(call.values[place]))
        if len(tensors) != len(left.slots):
            raise self._skeleton.unusual("a layer returns now this, now that")
        return tuple(
            tensor.movedim(slot.batch or 0, 0) for tensor, slot in zip(tensors, left.slots, strict=True) if slot.moves
        )

    def leaving(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """What enters the output projection, [samples, length, hidden], when the last layer has left this."""

        def replay(index: int, call: Call) -> Any:
            return self._replayed(index, call, batch, batch.state if index == self._last else None)

        return _end(self._run(batch.ids, replay, dtype, batch.numbers))

    # ------------------------------------------------------------------ how

    @cached_property
    def _last(self) -> int:
        return max(index for index in range(len(self._skeleton.layers)) if not self.is_idle(index))

    def before(self, index: int) -> int:
        """The layer whose output layer `index` gets; -1 for none."""
        return max((other for other in range(index) if not self.is_idle(other)), default=-1)

    def _moving(self, index: int) -> list[_Slot]:
        index = index if not self.is_idle(index) else self.before(index)
        return [slot for slot in self._learned.left[index].slots if slot.moves] if index >= 0 else []

    def _reach(self, wanted: int, batch: Batch, dtype: torch.dtype) -> Call:
        before = self.before(wanted)

        def replay(index: int, call: Call) -> Any:
            if index == wanted:
                raise Reached(call)
            return self._replayed(index, call, batch, batch.state if index == before else None)

        try:
            self._run(batch.ids, replay, dtype, batch.numbers)
        except Reached as reached:
            return reached.call
        raise self._skeleton.unusual(f"layer {wanted} isn't called")

    def _replayed(self, index: int, call: Call, batch: Batch, state: State | None) -> Any:
        """The result of a layer whose state is known, or something of the same form; fills the containers."""
        left, device = self._learned.left[index], self._loader.device
        known = iter(state or ())

        def tensor(slot: _Slot) -> torch.Tensor:
            if slot.batch is None:
                return slot.small
            if state is not None and slot.moves:
                return next(known).to(device).movedim(0, slot.batch)
            shape = slot.shape(*batch.ids.shape)
            return torch.zeros((), dtype=slot.small.dtype, device=device).expand(shape)

        result, shared = left.rebuilt(tensor(slot) for slot in left.slots)
        for place, content in shared.items():
            _fill(call.values[place], content)
        return result

    def _template(self, index: int, dtype: torch.dtype, length: int) -> Call | None:
        """The call of a layer for texts of this length, with a mark in place of the hidden states."""
        key = (dtype, length)
        if key not in self._templates:
            calls: list[Call | None] = [None] * len(self._skeleton.layers)
            place = self._learned.hidden

            def note(index: int, call: Call) -> Any:
                hidden = call.values[place]
                calls[index] = _exchanged(call, hidden, _HIDDEN)
                return mapped(self._learned.left[index].result, lambda _: hidden)

            self._run(self._text(1, length, 0), note, dtype)
            self._templates[key] = calls
        return self._templates[key][index]

    def _run(
        self, ids: torch.Tensor, on_call: Callable[[int, Call], Any], dtype: torch.dtype, numbers: range | None = None
    ) -> Any:
        """The model of text on token ids [samples, length], or on the shown sample of this number, with layers that do
        this."""
        outside = self._outside.setdefault(dtype, Outside(self._skeleton, self._loader, dtype))

        def forward(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: on_call(index, Call(args, kwargs))

        with replaced({layer: forward(index) for index, layer in enumerate(self._skeleton.layers)}), outside:
            if self._shown and numbers is not None:
                (number,) = numbers
                shown = self._shown[number]
                return self._skeleton.decoder(*shown.args, **shown.kwargs)
            return self._skeleton.decoder(input_ids=ids.to(self._loader.device), use_cache=False)

    # ------------------------------------------------------------------ learning

    @cached_property
    def _learned(self) -> _Learned:
        try:
            with torch.no_grad():
                try:
                    return self._learn()
                except RuntimeError:
                    if not self._skeleton.kept_in_float32:
                        raise
                # DeepSeek-V4's code can't run with norms in float32 between matrices in bfloat16.
                self._skeleton.kept_in_float32 = ()
                self._outside.clear()
                return self._learn()
        except QtoolError:
            raise
        except Exception as error:  # the model's own code, in surroundings that it may not expect
            raise self._skeleton.unusual(
                f"its own code fails on a text of any tokens ({in_one_line(error)})"
            ) from error

    def _learn(self) -> _Learned:
        small, large = (self._observed(*size) for size in zip(_SAMPLES, _TOKENS, strict=True))
        depth = len(self._skeleton.layers)
        order = [index for index, _, _, _ in small]
        if order != sorted(set(order)) or order != [index for index, _, _, _ in large]:
            raise self._skeleton.unusual("it doesn't call each of them once and in order")
        if not order:
            raise self._skeleton.unusual("it calls none of them")
        changed = {place for _, _, places, _ in small for place in places}
        left: list[_Left] = [_Left(None, {}, [])] * depth
        calls: list[Call | None] = [None] * depth
        for (index, call, _, (result, contents)), (_, _, _, (other, others)) in zip(small, large, strict=True):
            shared = {place: content for place, content in contents.items() if place in changed}
            tensors = [*tensors_in(result), *tensors_in(list(shared.values()))]
            twins = [*tensors_in(other), *tensors_in([others[place] for place in shared])]
            left[index] = _Left(result, shared, [_Slot.of(a, b) for a, b in zip(tensors, twins, strict=True)])
            calls[index] = call
        idle = frozenset(range(depth)) - set(order)
        learned = self._without_unused(_Learned(left, calls, None, idle, self._called))
        place = self._plain_place(learned, order) if not changed and not idle else None
        self._check_order(learned, order)
        return replace(learned, hidden=place)

    def _observed(self, samples: int, tokens: int) -> list[tuple[int, Call, set[Any], tuple[Any, dict[Any, Any]]]]:
        """Per layer that is called: (its number, its call, the places of containers that it changes, (its result,
        the content of all containers after it)). The layers' weights are zeros."""
        found = []

        def run(index: int, call: Call) -> Any:
            layer = self._skeleton.layers[index]
            before = {place: _content(value) for place, value in call.containers.items()}
            with self._zeros(layer), _noting(layer, self._called.setdefault(index, set())):
                result = type(layer).forward(layer, *call.args, **call.kwargs)
            after = {place: _content(value) for place, value in call.containers.items()}
            changed = {place for place in after if not _is_same(before[place], after[place])}
            noise = torch.Generator().manual_seed(index)

            def random(tensor: torch.Tensor) -> torch.Tensor:
                if not tensor.is_floating_point():
                    return tensor
                return torch.randn(tensor.shape, generator=noise).to(tensor)

            result = mapped(result, random)
            found.append((index, call, changed, (result, after)))
            return result

        self._run(self._text(samples, tokens, 0), run, self._loader.dtype)
        return found

    @contextmanager
    def _zeros(self, layer: nn.Module) -> Iterator[None]:
        """Within the block the layer has weights, all zero (pages that nobody wrote take no memory), and no experts."""
        saved = [
            (module, name, part, parameter)
            for name, module in layer.named_modules()
            for part, parameter in module._parameters.items()
            if parameter is not None
        ]
        with _handled([module for module in layer.modules() if isinstance(module, RoutedExperts)]):
            for module, name, part, parameter in saved:
                dtype = torch.float32 if self._loader.is_kept_in_float32(f"{name}.{part}") else parameter.dtype
                zeros = torch.zeros(parameter.shape, dtype=dtype, device=self._loader.device)
                module._parameters[part] = nn.Parameter(zeros, requires_grad=False)
            try:
                yield
            finally:
                for module, _, part, parameter in saved:
                    module._parameters[part] = parameter

    def _text(self, samples: int, tokens: int, seed: int) -> torch.Tensor:
        """Token ids [samples, tokens], any."""
        entries = self._skeleton.embedding.get_parameter("weight").shape[0]
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, min(entries, 1000), (samples, tokens), generator=generator)

    def _again(
        self,
        learned: _Learned,
        ids: torch.Tensor,
        change: Callable[[int, torch.Tensor], torch.Tensor],
        output: list[Any] | None = None,
    ) -> dict[int, Call]:
        """The calls when each layer leaves what it left on the small text, changed; `output` takes the result."""
        calls: dict[int, Call] = {}

        def replay(index: int, call: Call) -> Any:
            calls[index] = call
            left = learned.left[index]
            result, shared = left.rebuilt(change(index, slot.small) for slot in left.slots)
            for place, content in shared.items():
                _fill(call.values[place], content)
            return result

        result = self._run(ids, replay, self._loader.dtype)
        if output is not None:
            output.append(_end(result))
        return calls

    def _without_unused(self, learned: _Learned) -> _Learned:
        """With a mark at the tensors in results that nothing depends on."""
        counts = [len([*tensors_in(left.result)]) for left in learned.left]
        ids, left = self._text(_SAMPLES[0], _TOKENS[0], 0), list(learned.left)
        outputs: list[Any] = []
        kept = self._again(learned, ids, lambda _, tensor: tensor, outputs)
        for position in range(max(counts) if max(counts) > 1 else 0):
            having = [index for index, count in enumerate(counts) if position < count]
            chosen = {id(left[index].slots[position].small) for index in having}

            def change(_: int, tensor: torch.Tensor, chosen: set[int] = chosen) -> torch.Tensor:
                return (~tensor if tensor.dtype == torch.bool else tensor + 1) if id(tensor) in chosen else tensor

            calls = self._again(learned, ids, change, outputs)
            ours, theirs = ([call.values for call in each.values()] for each in (kept, calls))
            if alike(outputs[0], outputs.pop()) and alike(ours, theirs):
                for index in having:
                    slots = [*left[index].slots]
                    slots[position] = replace(slots[position], is_used=False)
                    left[index] = replace(left[index], slots=slots)
        return replace(learned, left=left)

    def _check_order(self, learned: _Learned, order: list[int]) -> None:
        """Raises InputError when a layer depends on what others left than the one before it."""
        ids = self._text(_SAMPLES[0], _TOKENS[0], 0)
        shared = {place for index in order for place in learned.left[index].shared}
        outputs: list[Any] = []
        kept = self._again(learned, ids, lambda _, tensor: tensor, outputs)
        self._again(learned, ids, lambda index, tensor: _other(tensor) if index != order[-1] else tensor, outputs)
        if not alike(*outputs):
            raise self._skeleton.unusual("what comes after the layers needs more than the last one leaves")
        for parity in (0, 1):
            changed = {index for position, index in enumerate(order) if position % 2 == parity}

            def change(index: int, tensor: torch.Tensor, changed: set[int] = changed) -> torch.Tensor:
                return _other(tensor) if index in changed else tensor

            calls = self._again(learned, ids, change)
            for before, index in pairwise(order):
                if before in changed:
                    continue
                ours, theirs = (_without(each[index].values, shared) for each in (kept, calls))
                if not alike(ours, theirs):
                    raise self._skeleton.unusual(f"layer {index} gets more than what layer {before} leaves")

    def _plain_place(self, learned: _Learned, order: list[int]) -> Any:
        """The place of the hidden states in all calls, if `_Learned.hidden` has one."""
        if any([slot.batch for slot in learned.left[index].slots if slot.moves] != [0] for index in order):
            return None
        ids = self._text(_SAMPLES[0], _TOKENS[0], 0)
        kept = self._again(learned, ids, lambda _, tensor: tensor)
        others = self._again(learned, self._text(_SAMPLES[0], _TOKENS[0], 1), lambda _, tensor: tensor)
        left = {index: next(slot.small for slot in learned.left[index].slots if slot.moves) for index in order}
        places = {
            place
            for before, index in pairwise(order)
            for place, value in kept[index].values.items()
            if value is left[before]
        }
        first = kept[order[0]].values
        if not places:  # one layer
            places = {place for place, value in first.items() if _looks_like(value, left[order[0]])}
        if len(places) != 1:
            return None
        (place,) = places
        if not _looks_like(first.get(place), left[order[0]]):
            return None
        if any(kept[index].values.get(place) is not left[b] for b, index in pairwise(order)):
            return None
        single = self._single(learned, ids)
        for index in order:
            ours, theirs, alone = (_without(each[index].values, {place}) for each in (kept, others, single))
            if not alike(ours, theirs) or not _broadcasts(alone, ours):
                return None
        grown = not alike([call.values for call in kept.values()], [call.values for call in single.values()])
        return place if not grown or self._takes_several(single, left, place) else None

    def _takes_several(self, single: dict[int, Call], left: dict[int, torch.Tensor], place: Any) -> bool:
        """Whether layers run on several samples with masks that were made for one."""
        done = set()
        for index, call in single.items():
            layer = self._skeleton.layers[index]
            if (kind := signature(layer)) in done:
                continue
            done.add(kind)
            wanted = _exchanged(call, call.values[place], left[index])
            try:
                with self._zeros(layer):
                    type(layer).forward(layer, *wanted.args, **wanted.kwargs)
            except (RuntimeError, ValueError, IndexError):
                return False
        return True

    def _single(self, learned: _Learned, ids: torch.Tensor) -> dict[int, Call]:
        return self._again(learned, ids[:1], lambda _, tensor: tensor[:1])


def _end(output: Any) -> torch.Tensor:
    """What enters the output projection, of what the model of text returns; caches (XLNet's memories) don't count."""
    hidden: torch.Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden


def _exchanged(call: Call, old: torch.Tensor, new: torch.Tensor) -> Call:
    return call.with_tensors(lambda tensor: new if tensor is old else tensor)


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Other numbers; whole ones may be places in something, and stay."""
    return tensor + 1 if tensor.is_floating_point() else tensor


# Stands for hidden states in a call.
_HIDDEN = torch.empty(0)


def _looks_like(value: Any, tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tensor.shape and value.dtype == tensor.dtype


def _without(values: dict[Any, Any], places: set[Any]) -> list[Any]:
    return [value for place, value in values.items() if place not in places]


def _broadcasts(one: Any, two: Any) -> bool:
    """Whether tensors for one sample serve for several."""
    pairs = zip(tensors_in(one), tensors_in(two), strict=True)
    return all(a.shape == b.shape or (_expands(a, b) and alike(a.expand_as(b), b)) for a, b in pairs)


def _expands(one: torch.Tensor, two: torch.Tensor) -> bool:
    """A vector with a number for each sample doesn't: a layer may choose samples by it."""
    same = one.dim() == two.dim() >= 2
    return same and all(a in (1, b) for a, b in zip(one.shape, two.shape, strict=True))


def _content(container: Any) -> Any:
    return dict(container) if isinstance(container, MutableMapping) else list(container)


def _is_same(first: Any, second: Any) -> bool:
    ones, others = list(tensors_in(first)), list(tensors_in(second))
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))


def _fill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, MutableMapping):
        container.update(content)
    else:
        container.extend(content)


@contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the block a call of these modules does this instead."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


@contextmanager
def _noting(layer: nn.Module, called: set[str]) -> Iterator[None]:
    """Within the block the linears that are called are noted."""
    with ExitStack() as stack:
        for name, linear in linear_layers(layer).items():
            hook = linear.register_forward_pre_hook(lambda _m, _args, name=name: called.add(name))
            stack.callback(hook.remove)
        yield


@contextmanager
def _handled(routed: list[RoutedExperts]) -> Iterator[None]:
    if not routed:
        yield
        return
    with handled(routed[0], lambda x, _chosen, _weights: torch.zeros_like(x)), _handled(routed[1:]):
        yield


def _batch_first(slot: _Slot, samples: int, length: int) -> list[int]:
    shape = slot.shape(samples, length)
    assert slot.batch is not None
    return [shape[slot.batch], *shape[: slot.batch], *shape[slot.batch + 1 :]]
