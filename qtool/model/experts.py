"""A layer's routed experts, one at a time: fused parameters in transformers 5, three linears each in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qtool.model.architectures import FusedExperts
from qtool.model.loader import Loader, Quantizer
from qtool.model.names import ExpertNames
from qtool.model.skeleton import Skeleton

# (hidden states [tokens, hidden], expert numbers [tokens, k], their weights [tokens, k]) -> output [tokens, hidden]
Handler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RoutedExperts(nn.Module):
    """Stands in a decoder layer for its fused experts, without their weights.

    Args:
        fused: what it stands for.
        names: of each expert's linears, in the checkpoint.
        loader: of the model.

    Attributes:
        names: as given.
        apply_gate: [tokens, gate and up] -> [tokens, intermediate], the architecture's own.
        router: the parameter [experts, hidden] that scores the experts, by its name inside the decoder layer, if any.
        handler: what a call does; at first each expert in use is loaded and run.

    Raises:
        InputError: an expert's tensor is missing or of another shape.
    """

    def __init__(self, fused: FusedExperts, names: list[ExpertNames], loader: Loader) -> None:
        super().__init__()
        self.names = names
        self.apply_gate: Callable[[torch.Tensor], torch.Tensor] = fused.apply_gate
        self.router = fused.router
        self.handler: Handler = self._run
        self._loader = loader
        self._outer, self._inner = (fused.intermediate, fused.hidden), (fused.hidden, fused.intermediate)
        for expert in names:
            for name, shape in zip(expert, (self._outer, self._outer, self._inner), strict=True):
                loader.check(f"{name}.weight", shape)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.handler(hidden, chosen, weights)

    def expert(self, number: int) -> Expert:
        """An expert with its weights loaded. Raises InputError when a tensor holds NaN."""
        names = self.names[number]
        gate, quantize = self._loader.linear(names.gate, self._outer)
        up, _ = self._loader.linear(names.up, self._outer)
        down, quantize_inner = self._loader.linear(names.down, self._inner)
        return Expert(gate, up, down, self.apply_gate, quantize, quantize_inner)

    def _run(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        count = len(self.names)
        routing = Routing(chosen, weights, count)
        busy = (number for number, tokens in enumerate(routing.counts(count)) if tokens)
        return run_all(((number, self.expert(number)) for number in busy), routing, hidden)


def take_out(skeleton: Skeleton, loader: Loader) -> None:
    """Put a RoutedExperts in place of every fused module, so that a layer's parameters are those of the rest.

    Raises InputError for experts of a kind that isn't known, or that the checkpoint lacks.
    """
    where = loader.weights.where
    for index, layer in enumerate(skeleton.layers):
        layer_name = f"{skeleton.layers_name}.{index}"
        for fused in [*skeleton.architecture.experts(layer, layer_name, where)]:
            names = loader.names.experts(f"{layer_name}.{fused.name}", fused, where)
            layer.set_submodule(fused.name, RoutedExperts(fused, names, loader))


@contextmanager
def handled(module: RoutedExperts, handler: Handler) -> Iterator[None]:
    """Within the block a call of the experts does this."""
    saved, module.handler = module.handler, handler
    try:
        yield
    finally:
        module.handler = saved


@dataclass(frozen=True)
class Expert:
    """One expert's weights in the compute type.

    Attributes:
        gate, up: [intermediate, hidden].
        down: [hidden, intermediate].
        apply_gate: of the architecture.
        quantize, quantize_inner: what the inputs of gate and up, and of down, go through in a quantized checkpoint.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    apply_gate: Callable[[torch.Tensor], torch.Tensor]
    quantize: Quantizer | None = None
    quantize_inner: Quantizer | None = None

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What enters down, [tokens, intermediate], of x [tokens, hidden]."""
        x = x if self.quantize is None else self.quantize(x)
        linear = nn.functional.linear
        return self.apply_gate(torch.cat((linear(x, self.gate), linear(x, self.up)), dim=-1))

    def output(self, inner: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]."""
        return nn.functional.linear(inner if self.quantize_inner is None else self.quantize_inner(inner), self.down)


class Routing:
    """Which tokens go to which expert.

    Args:
        chosen: expert numbers [tokens, k].
        weights: their weights [tokens, k].
    """

    def __init__(self, chosen: torch.Tensor, weights: torch.Tensor, count: int) -> None:
        self._top = chosen.shape[1]
        flat = chosen.flatten()
        self._order = torch.argsort(flat, stable=True)
        self._ends = torch.bincount(flat.clamp(max=count), minlength=count + 1).cumsum(0).tolist()
        self._weights = weights.flatten()

    def tokens(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the tokens' numbers, ascending, int64 [n]; the expert's weight for each [n])."""
        places = self._order[self._ends[expert - 1] if expert else 0 : self._ends[expert]]
        return places // self._top, self._weights[places]

    def counts(self, experts: int) -> list[int]:
        """How many tokens each expert has."""
        return [end - start for start, end in zip([0, *self._ends], self._ends[:experts], strict=False)]


def run_all(experts: Iterator[tuple[int, Expert]], routing: Routing, hidden: torch.Tensor) -> torch.Tensor:
    """The output [tokens, hidden] of all experts, given one after the other; summed in float32."""
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for number, expert in experts:
        tokens, weights = routing.tokens(number)
        output = expert.output(expert.inner(hidden[tokens])).float() * weights[:, None].float()
        total.index_add_(0, tokens, output)
    return total.to(hidden.dtype)
