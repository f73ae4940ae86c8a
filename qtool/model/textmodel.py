"""The model of text, as transformers wrote it, run with layers that do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.model.loader import Loader
from qtool.model.outside import Outside
from qtool.model.skeleton import Skeleton
from qtool.model.structure import mapped


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

    def exchanged(self, old: torch.Tensor, new: torch.Tensor) -> Call:
        """The same with another tensor in place of one."""
        return self.with_tensors(lambda tensor: new if tensor is old else tensor)


class Reached(Exception):
    """A layer, or the model of text, is called, and nothing after that matters."""

    def __init__(self, call: Call) -> None:
        self.call = call


class TextModel:
    """The model's own forward, around its decoder layers.

    Args:
        skeleton: of the model.
        loader: of its weights.

    Attributes:
        shown: calls of the model of text, where samples are those of these calls, by their numbers.
    """

    def __init__(self, skeleton: Skeleton, loader: Loader) -> None:
        self._skeleton, self._loader = skeleton, loader
        self._outside: dict[torch.dtype, Outside] = {}
        self.shown: Sequence[Call] = ()

    def run(
        self, ids: torch.Tensor, on_call: Callable[[int, Call], Any], dtype: torch.dtype, numbers: range | None = None
    ) -> Any:
        """What it gives for token ids [samples, length], or for the shown sample of this number.

        Args:
            on_call: gets a layer's number and what it is called with; what it returns is the layer's result.
            dtype: to compute in around the layers.
        """
        outside = self._outside.setdefault(dtype, Outside(self._skeleton, self._loader, dtype))

        def forward(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: on_call(index, Call(args, kwargs))

        with replaced({layer: forward(index) for index, layer in enumerate(self._skeleton.layers)}), outside:
            if self.shown and numbers is not None:
                (number,) = numbers
                shown = self.shown[number]
                return self._skeleton.decoder(*shown.args, **shown.kwargs)
            return self._skeleton.decoder(input_ids=ids.to(self._loader.device), use_cache=False)

    def any_text(self, samples: int, tokens: int, seed: int) -> torch.Tensor:
        """Token ids [samples, tokens], any."""
        entries = self._skeleton.embedding.get_parameter("weight").shape[0]
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, min(entries, 1000), (samples, tokens), generator=generator)

    def forget_weights(self) -> None:
        """Read the weights around the layers anew."""
        self._outside.clear()


def hidden_states(output: Any) -> torch.Tensor:
    """What enters the output projection, of what the model of text returns; caches (XLNet's memories) don't count."""
    hidden: torch.Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return hidden


def content_of(container: Any) -> Any:
    """What is in a container now, in a new one."""
    return dict(container) if isinstance(container, MutableMapping) else list(container)


def fill(container: Any, content: Any) -> None:
    """Put this into a container in place of what it has."""
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
