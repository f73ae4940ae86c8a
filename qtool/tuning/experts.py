"""Routed experts in a measurement of sensitivities: their noise, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from qtool.model.experts import RoutedExperts
from qtool.model.gradients import Passage, grad
from qtool.model.loader import input_quantizer
from qtool.model.recorder import Recorder
from qtool.recipe.schema import Policy
from qtool.tuning.job import Measured, Sensitivity
from qtool.tuning.noise import Tally


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
                found = grad([outputs[DOWN]], [outputs[GATE], outputs[UP]], [g], draw + 1 < len(by_output))
                by = dict(zip((GATE, UP, DOWN), (*found, g), strict=True))
                for part in linears:
                    products = torch.zeros(len(all_tokens))
                    products[tokens] = (by[part] * noise[part]).sum(dim=-1)
                    tally.add(names[part], products)
