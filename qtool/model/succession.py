"""How the layers of a decoder follow each other.

What a layer leaves for the next one is learned once, on a few tokens: the tensors in its result, and what it puts into
a container that is handed from layer to layer (the shared keys and values of Gemma 3n and 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from qtool.errors import QtoolError, in_one_line
from qtool.model.experts import RoutedExperts, handled
from qtool.model.loader import Loader
from qtool.model.skeleton import Skeleton
from qtool.model.structure import alike, mapped, tensors_in
from qtool.model.textmodel import Call, TextModel, content_of, fill, hidden_states
from qtool.quant.topology import linear_layers, signature

_SAMPLES, _TOKENS = (2, 3), (8, 12)  # of the texts that it is learned on


@dataclass(frozen=True)
class Slot:
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
    def of(cls, small: torch.Tensor, large: torch.Tensor) -> Slot:
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

    def batch_first(self, samples: int, length: int) -> list[int]:
        """The same with the samples in front."""
        assert self.batch is not None
        shape = self.shape(samples, length)
        return [shape[self.batch], *shape[: self.batch], *shape[self.batch + 1 :]]


@dataclass(frozen=True)
class Left:
    """What a layer leaves.

    Attributes:
        result: what it returns, on the small text.
        shared: what is then in the containers, by their places in the call, on the small text.
        slots: of the tensors in both, in order.
    """

    result: Any
    shared: dict[Any, Any]
    slots: list[Slot]

    def rebuilt(self, tensors: Iterator[torch.Tensor]) -> tuple[Any, dict[Any, Any]]:
        """Result and content of the containers, with these tensors."""
        result = mapped(self.result, lambda _: next(tensors))
        return result, {place: mapped(content, lambda _: next(tensors)) for place, content in self.shared.items()}


@dataclass(frozen=True)
class Succession:
    """How the layers follow each other.

    Attributes:
        left: what each layer leaves.
        hidden: the place of the hidden states in every call, where these alone pass from layer to layer and all other
            arguments depend on the text's length only; None for any other model.
        idle: layers that a text doesn't go through (cross-attention to pictures).
        called: per layer the linears that it goes through, by their names inside the layer.
    """

    left: list[Left]
    hidden: Any
    idle: frozenset[int]
    called: dict[int, set[str]]


def learn(text: TextModel, skeleton: Skeleton, loader: Loader) -> Succession:
    """Find it out. Raises InputError for a model whose layers can't be run one by one."""
    try:
        with torch.no_grad():
            try:
                return _Learner(text, skeleton, loader).learn()
            except RuntimeError:
                if not skeleton.kept_in_float32:
                    raise
            # DeepSeek-V4's code can't run with norms in float32 between matrices in bfloat16.
            skeleton.kept_in_float32 = ()
            text.forget_weights()
            return _Learner(text, skeleton, loader).learn()
    except QtoolError:
        raise
    except Exception as error:  # the model's own code, in surroundings that it may not expect
        raise skeleton.unusual(f"its own code fails on a text of any tokens ({in_one_line(error)})") from error


class _Learner:
    def __init__(self, text: TextModel, skeleton: Skeleton, loader: Loader) -> None:
        self._text, self._skeleton, self._loader = text, skeleton, loader
        self._called: dict[int, set[str]] = {}

    def learn(self) -> Succession:
        small, large = (self._observed(*size) for size in zip(_SAMPLES, _TOKENS, strict=True))
        depth = len(self._skeleton.layers)
        order = [index for index, _, _ in small]
        if order != sorted(set(order)) or order != [index for index, _, _ in large]:
            raise self._skeleton.unusual("it doesn't call each of them once and in order")
        if not order:
            raise self._skeleton.unusual("it calls none of them")
        changed = {place for _, places, _ in small for place in places}
        left: list[Left] = [Left(None, {}, [])] * depth
        for (index, _, (result, contents)), (_, _, (other, others)) in zip(small, large, strict=True):
            shared = {place: content for place, content in contents.items() if place in changed}
            tensors = [*tensors_in(result), *tensors_in(list(shared.values()))]
            twins = [*tensors_in(other), *tensors_in([others[place] for place in shared])]
            left[index] = Left(result, shared, [Slot.of(a, b) for a, b in zip(tensors, twins, strict=True)])
        idle = frozenset(range(depth)) - set(order)
        learned = self._without_unused(Succession(left, None, idle, self._called))
        place = self._plain_place(learned, order) if not changed and not idle else None
        self._check_order(learned, order)
        return replace(learned, hidden=place)

    def _observed(self, samples: int, tokens: int) -> list[tuple[int, set[Any], tuple[Any, dict[Any, Any]]]]:
        """Per layer that is called: (its number, the places of containers that it changes, (its result,
        the content of all containers after it)). The layers' weights are zeros."""
        found = []

        def run(index: int, call: Call) -> Any:
            layer = self._skeleton.layers[index]
            before = {place: content_of(value) for place, value in call.containers.items()}
            with self._zeros(layer), _noting(layer, self._called.setdefault(index, set())):
                result = type(layer).forward(layer, *call.args, **call.kwargs)
            after = {place: content_of(value) for place, value in call.containers.items()}
            changed = {place for place in after if not _is_same(before[place], after[place])}
            noise = torch.Generator().manual_seed(index)

            def random(tensor: torch.Tensor) -> torch.Tensor:
                if not tensor.is_floating_point():
                    return tensor
                return torch.randn(tensor.shape, generator=noise).to(tensor)

            result = mapped(result, random)
            found.append((index, changed, (result, after)))
            return result

        self._text.run(self._text.any_text(samples, tokens, 0), run, self._loader.dtype)
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

    def _again(
        self,
        learned: Succession,
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
                fill(call.values[place], content)
            return result

        result = self._text.run(ids, replay, self._loader.dtype)
        if output is not None:
            output.append(hidden_states(result))
        return calls

    def _without_unused(self, learned: Succession) -> Succession:
        """With a mark at the tensors in results that nothing depends on."""
        counts = [len([*tensors_in(left.result)]) for left in learned.left]
        ids, left = self._text.any_text(_SAMPLES[0], _TOKENS[0], 0), list(learned.left)
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

    def _check_order(self, learned: Succession, order: list[int]) -> None:
        """Raises InputError when a layer depends on what others left than the one before it."""
        ids = self._text.any_text(_SAMPLES[0], _TOKENS[0], 0)
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

    def _plain_place(self, learned: Succession, order: list[int]) -> Any:
        """The place of the hidden states in all calls, if `Succession.hidden` has one."""
        if any([slot.batch for slot in learned.left[index].slots if slot.moves] != [0] for index in order):
            return None
        ids = self._text.any_text(_SAMPLES[0], _TOKENS[0], 0)
        kept = self._again(learned, ids, lambda _, tensor: tensor)
        others = self._again(learned, self._text.any_text(_SAMPLES[0], _TOKENS[0], 1), lambda _, tensor: tensor)
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
            wanted = call.exchanged(call.values[place], left[index])
            try:
                with self._zeros(layer):
                    type(layer).forward(layer, *wanted.args, **wanted.kwargs)
            except (RuntimeError, ValueError, IndexError):
                return False
        return True

    def _single(self, learned: Succession, ids: torch.Tensor) -> dict[int, Call]:
        return self._again(learned, ids[:1], lambda _, tensor: tensor[:1])


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Other numbers; whole ones may be places in something, and stay."""
    return tensor + 1 if tensor.is_floating_point() else tensor


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


def _is_same(first: Any, second: Any) -> bool:
    ones, others = list(tensors_in(first)), list(tensors_in(second))
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))


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
