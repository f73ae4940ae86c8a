"""A layer's routed experts, one at a time: fused parameters in transformers 5, three linears each in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.errors import InputError
from qtool.model.names import ExpertNames

# (hidden states [tokens, hidden], expert numbers [tokens, k], their weights [tokens, k]) -> output [tokens, hidden]
Handler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RoutedExperts(nn.Module):
    """Stands in a decoder layer for its fused experts, without their weights.

    Attributes:
        names: of each expert's linears.
        apply_gate: [tokens, gate and up] -> [tokens, intermediate], the architecture's own.
        router: the parameter [experts, hidden] that scores the experts, by its name inside the decoder layer, if any.
        handler: what a call does.
    """

    def __init__(self, fused: nn.Module, names: list[ExpertNames], router: str | None) -> None:
        super().__init__()
        self.names = names
        self.apply_gate: Callable[[torch.Tensor], torch.Tensor] = fused._apply_gate  # type: ignore[assignment]
        self.router = router
        self.handler: Handler = lambda hidden, _chosen, _weights: hidden

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.handler(hidden, chosen, weights)


@contextmanager
def handled(module: RoutedExperts, handler: Handler) -> Iterator[None]:
    """Within the block a call of the experts does this."""
    saved, module.handler = module.handler, handler
    try:
        yield
    finally:
        module.handler = saved


def is_fused(module: nn.Module) -> bool:
    """Whether this module holds all experts of a layer as three-dimensional parameters."""
    return {name: p.dim() for name, p in module.named_parameters(recurse=False)}.get("down_proj") == 3


def refuse_unusual(module: Any, name: str, where: str) -> None:
    """Raises InputError unless the experts are gated linears without biases, as DeepSeek's are."""
    usual = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    unusual = [key for key, value in usual.items() if getattr(module, key, value) != value]
    if unusual or not hasattr(module, "_apply_gate"):
        raise InputError(
            f"the experts of {name} are of a kind that qtool doesn't read ({', '.join(unusual) or 'no gate'})",
            where=where,
            hint="it reads experts of three linears: gate, up, down",
        )


def router_of(layer: nn.Module, experts_name: str, count: int, width: int) -> str | None:
    """The parameter [count, width] beside the experts, by its name inside the layer."""
    parent = experts_name.rpartition(".")[0]
    for name, parameter in layer.get_submodule(parent).named_parameters():
        if tuple(parameter.shape) == (count, width) and name.count(".") == 1:
            return f"{parent}.{name}" if parent else name
    return None


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
    quantize: Callable[[torch.Tensor], torch.Tensor] | None = None
    quantize_inner: Callable[[torch.Tensor], torch.Tensor] | None = None

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
