"""Routed experts in a measurement of sensitivities: gradients through them, and their noise, one in memory at a time.

While a layer runs, a leaf of the graph takes the place of what its experts give. That is added to the layer's output
(`model.probe` makes sure), so the leaf's value changes no gradient, and the experts can follow one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from qtool.engines.native.context import Context
from qtool.engines.native.experts import (
    DOWN,
    GATE,
    UP,
    ExpertLinears,
    ExpertSamples,
    SmoothedExpert,
    expert_groups,
)
from qtool.model.experts import RoutedExperts, handled
from qtool.model.loader import input_quantizer
from qtool.model.recorder import Recorder
from qtool.recipe.schema import Policy
from qtool.tuning.job import Measured, Sensitivity
from qtool.tuning.noise import Tally


@dataclass(frozen=True)
class Passage:
    """What a run of the layer sent to its experts.

    Attributes:
        hidden: their input [tokens, hidden], in the graph.
        chosen: expert numbers [tokens, k].
        weights: of these [tokens, k], in the graph.
        output: the leaf [tokens, hidden].
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor

    def detached(self) -> Passage:
        """The same without the graph."""
        return Passage(self.hidden.detach(), self.chosen, self.weights.detach(), self.output.detach())

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens [n], places among the chosen [n], routing weights [n, 1]) of an expert; without gradients."""
        tokens, places = torch.where(self.chosen == expert)
        return tokens, places, self.weights.detach()[tokens, places, None]


@contextmanager
def replaced(module: RoutedExperts | None) -> Iterator[list[Passage]]:
    """Within the block a run of the layer appends its passage in place of calling the experts."""
    passages: list[Passage] = []

    def leave(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        passages.append(Passage(hidden, chosen, weights, torch.zeros_like(hidden).requires_grad_()))
        return passages[-1].output

    if module is None:
        yield passages
    else:
        with handled(module, leave):
            yield passages


@dataclass(frozen=True)
class Gradients:
    """Of a layer's output.

    Attributes:
        by: per draw, by each of the tensors asked for.
        by_experts: by what the experts gave, [draws, tokens, hidden]; None where none were called.
    """

    by: list[list[torch.Tensor]]
    by_experts: torch.Tensor | None


def gradients(
    module: RoutedExperts | None,
    passages: Sequence[Passage],
    output: torch.Tensor,
    by: Sequence[torch.Tensor],
    seeds: torch.Tensor,
) -> Gradients:
    """Gradients of a layer's output, through its experts.

    Args:
        passages: of this run, from `replaced`.
        by: tensors of the graph.
        seeds: gradients by the output, [draws, ...].
    """
    if module is None or not passages:
        return Gradients([_grad([output], by, [seed], i + 1 < len(seeds)) for i, seed in enumerate(seeds)], None)
    (passage,) = passages
    by_output = torch.stack([_grad([output], [passage.output], [seed], True)[0] for seed in seeds])
    by_hidden = torch.zeros(len(seeds), *passage.hidden.shape)
    by_weights = torch.zeros(len(seeds), *passage.weights.shape)
    for number in range(len(module.names)):
        tokens, places, weights = passage.of(number)
        if not len(tokens):
            continue
        expert = module.expert(number)
        with torch.enable_grad():
            x = passage.hidden.detach()[tokens].requires_grad_()
            given = expert.output(expert.inner(x))
        for draw, all_tokens in enumerate(by_output):
            g = all_tokens[tokens]
            by_weights[draw, tokens, places] = (g * given.detach()).sum(dim=-1)
            by_hidden[draw].index_add_(0, tokens, _grad([given], [x], [g * weights], draw + 1 < len(seeds))[0])
    found = [
        _grad([output, passage.hidden, passage.weights], by, [seed, *rest], draw + 1 < len(seeds))
        for draw, (seed, *rest) in enumerate(zip(seeds, by_hidden, by_weights, strict=True))
    ]
    return Gradients(found, by_output)


def _grad(
    outputs: Sequence[torch.Tensor], by: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], keep: bool
) -> list[torch.Tensor]:
    """Gradients of the outputs together; zeros by what none of them depends on."""
    if not by:
        return []
    pairs = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in pairs], list(by), [seed for _, seed in pairs], retain_graph=keep, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


@dataclass(frozen=True)
class RoutedTokens:
    """The calibration tokens of a layer's routed experts.

    Attributes:
        module: the experts.
        recorder: has the tokens that reached them.
        router: float32 [experts, hidden], if there is one.
        enough: how many an expert's statistics need.
    """

    module: RoutedExperts
    recorder: Recorder
    router: torch.Tensor | None
    enough: int

    def samples(self) -> Callable[[int], torch.Tensor]:
        """For each expert the inputs [n, hidden] that its statistics are of."""
        count = len(self.module.names)
        routing = self.recorder.routing(count)
        counts = routing.counts(count)
        short = [expert for expert in range(count) if counts[expert] < self.enough]
        extra = self.recorder.likely(short, counts, routing, self.router, self.enough)
        return lambda expert: self.recorder.seen(expert, routing, extra)


@dataclass
class ExpertNoise:
    """g·δ of the linears of a layer's experts.

    Attributes:
        runs: (passage, gradients by the experts' output [draws, tokens, hidden]) over the text.
    """

    runs: list[tuple[Passage, torch.Tensor]] = field(default_factory=list)

    def measure(
        self, context: Context, tokens: RoutedTokens, ways: Mapping[str, Mapping[str, Policy | None]]
    ) -> Measured:
        """All experts of the layer together, and each of their linears, the ways in turn.

        Args:
            context: the float model, and the format of the quantized one.
            tokens: what the experts are calibrated on.
            ways: policies by full linear name; what has none in a way is not measured there.
        """
        module, weights = tokens.module, context.model.weights
        samples = tokens.samples()
        tallies = {way: Tally() for way, wanted in ways.items() if any(wanted[n] for e in module.names for n in e)}
        for number, expert_names in enumerate(module.names):
            names = expert_names.parts
            seen = samples(number)
            with weights.holding(f"{name}.weight" for name in names.values()):
                inner = module.expert(number).inner(seen) if len(seen) else None
                for way, tally in tallies.items():
                    policies = {part: ways[way][name] for part, name in names.items()}
                    if not any(policies.values()):
                        continue
                    linears = ExpertLinears(names, policies, expert_groups(module.apply_gate, has_gate=GATE in names))
                    expert = SmoothedExpert(linears, ExpertSamples(seen, inner), weights, context.format, context.rows)
                    self._add(tally, number, module, names, expert)
        found = Measured([], [])
        for way, tally in tallies.items():
            everything = list(tally.products)
            mode = next(policy.activations.mode for name in everything if (policy := ways[way][name]))
            found.groups.append(Sensitivity(everything, way, mode, None, *tally.of(everything)))
            found.linears.extend(Sensitivity([name], way, mode, None, *tally.of([name])) for name in everything)
        return found

    def _add(
        self, tally: Tally, number: int, module: RoutedExperts, names: Mapping[str, str], expert: SmoothedExpert
    ) -> None:
        linears = {part: linear for made, _ in expert.quantize() for part, linear in made.result()[0].items()}
        weights = {part: expert.folded.rows(part, 0, expert.folded.shape(part)[0]) for part in names}
        biases = {part: expert.folded.vector(f"{part}.bias") for part in names}
        for passage, by_output in self.runs:
            tokens, _, routing_weights = passage.of(number)
            x = passage.hidden.detach()[tokens]
            with torch.enable_grad():
                first = [part for part in names if part != DOWN]
                outputs = {
                    part: nn.functional.linear(x, weights[part], biases[part]).requires_grad_() for part in first
                }
                inner = module.apply_gate(torch.cat([outputs[part] for part in first], dim=-1))
                outputs[DOWN] = nn.functional.linear(inner, weights[DOWN], biases[DOWN])
            noise = {}
            for part, linear in linears.items():
                entering = inner.detach() if part == DOWN else x
                output = outputs[part].detach()
                rounded = input_quantizer(linear)(entering) if len(entering) else entering
                noise[part] = nn.functional.linear(rounded, linear.dequantize(), biases[part]).sub_(output)
                tally.count(names[part], noise[part], output)
            for draw, all_tokens in enumerate(by_output):
                g = all_tokens[tokens] * routing_weights
                found = _grad([outputs[DOWN]], [outputs[GATE], outputs[UP]], [g], draw + 1 < len(by_output))
                by = dict(zip((GATE, UP, DOWN), (*found, g), strict=True))
                for part in linears:
                    products = torch.zeros(len(all_tokens))
                    products[tokens] = (by[part] * noise[part]).sum(dim=-1)
                    tally.add(names[part], products)
