"""A layer's routed experts, one at a time: fused parameters in transformers 5, three linears each in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from qtool.model.architectures import FusedExperts
from qtool.model.loader import Loader, Quantizer
from qtool.model.names import ExpertNames
from qtool.model.skeleton import Skeleton
from qtool.model.unfused import Slice, Unfused, expert_names, slices, stem_of
from qtool.model.weights import ModelWeights

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
        self._has_bias, self._has_identities = fused.has_bias, fused.has_identities
        for expert in names:
            for part, name in expert.parts.items():
                shape = self._inner if part == "down_proj" else self._outer
                loader.check(f"{name}.weight", shape)
                if fused.has_bias:
                    loader.check(f"{name}.bias", shape[:1])

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        if chosen is None or weights is None:
            return self._sorted(hidden)
        given = self.handler(hidden, chosen, weights)
        if not self._has_identities:
            return given
        own = weights.float() * (chosen >= len(self.names))
        return given + (hidden.float() * own.sum(dim=-1, keepdim=True)).to(given.dtype)

    def _sorted(self, hidden: torch.Tensor) -> torch.Tensor:
        """For [experts * tokens, hidden], one expert's tokens after the other's, zeros where a token isn't its own."""
        count, given = len(self.names), torch.zeros_like(hidden)
        rows = hidden.abs().amax(dim=-1).nonzero()[:, 0]
        experts = rows // (len(hidden) // count)
        given[rows] = self.handler(hidden[rows], experts[:, None], torch.ones_like(hidden[rows, :1]))
        return given

    def expert(self, number: int) -> Expert:
        """An expert with its weights loaded. Raises InputError when a tensor holds NaN."""
        names = self.names[number]
        with self._loader.weights.together():
            return self._loaded(names)

    def _loaded(self, names: ExpertNames) -> Expert:
        gate = None if names.gate is None else self._loader.linear(names.gate, self._outer)[0]
        up, quantize = self._loader.linear(names.up, self._outer)
        down, quantize_inner = self._loader.linear(names.down, self._inner)
        biases = {part: self._bias(name, part) for part, name in names.parts.items()} if self._has_bias else {}
        return Expert(gate, up, down, self.apply_gate, quantize, quantize_inner, biases)

    def _bias(self, name: str, part: str) -> torch.Tensor:
        shape = self._inner if part == "down_proj" else self._outer
        return self._loader.tensor(f"{name}.bias", shape[:1])

    def _run(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        count = len(self.names)
        routing = Routing(chosen, weights, count)
        busy = (number for number, tokens in enumerate(routing.counts(count)) if tokens)
        return run_all(((number, self.expert(number)) for number in busy), routing, hidden)


def split(skeleton: Skeleton, loader: Loader) -> ModelWeights:
    """The model's weights with a matrix for each expert that the checkpoint stores together with others."""
    weights, found = loader.weights, dict[str, Slice]()
    for fused, module in _fused(skeleton, weights.where):
        found |= slices(fused, module, loader.names, weights) or {}
    return Unfused(weights, found) if found else weights


def take_out(skeleton: Skeleton, loader: Loader) -> None:
    """Put a RoutedExperts in place of every fused module, so that a layer's parameters are those of the rest.

    Raises InputError for experts of a kind that isn't known, or that the checkpoint lacks.
    """
    for fused, module in [*_fused(skeleton, loader.weights.where)]:
        names = _own_names(fused, module, loader)
        skeleton.model.set_submodule(module, RoutedExperts(fused, names, loader))


def _own_names(fused: FusedExperts, module: str, loader: Loader) -> list[ExpertNames]:
    """Of experts under names that `split` gave them, or a quantized checkpoint has from there; else transformers'."""
    down = f"{module}.{fused.down}"
    if not loader.names.splits(down):
        for tensor in (loader.stored(down), down):
            named = expert_names(stem_of(tensor), fused)
            if f"{named[0].down}.weight" in loader.weights:
                return named
    return loader.names.experts(module, fused, loader.weights.where)


def _fused(skeleton: Skeleton, where: str) -> Iterator[tuple[FusedExperts, str]]:
    """Every module of experts, and its whole name in the model."""
    for index, layer in enumerate(skeleton.layers):
        layer_name = f"{skeleton.layers_name}.{index}"
        for fused in [*skeleton.architecture.experts(layer, layer_name, where)]:
            yield fused, f"{layer_name}.{fused.name}"


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
        gate, up: [intermediate, hidden]; gate is None where the expert has none.
        down: [hidden, intermediate].
        apply_gate: of the architecture.
        quantize, quantize_inner: what the inputs of gate and up, and of down, go through in a quantized checkpoint.
        biases: by gate_proj, up_proj, down_proj; empty where there are none.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    apply_gate: Callable[[torch.Tensor], torch.Tensor]
    quantize: Quantizer | None = None
    quantize_inner: Quantizer | None = None
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What enters down, [tokens, intermediate], of x [tokens, hidden]."""
        x = x if self.quantize is None else self.quantize(x)
        linear = nn.functional.linear
        up = linear(x, self.up, self.biases.get("up_proj"))
        if self.gate is None:
            return self.apply_gate(up)
        return self.apply_gate(torch.cat((linear(x, self.gate, self.biases.get("gate_proj")), up), dim=-1))

    def output(self, inner: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]."""
        inner = inner if self.quantize_inner is None else self.quantize_inner(inner)
        return nn.functional.linear(inner, self.down, self.biases.get("down_proj"))


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
