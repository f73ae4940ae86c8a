"""The routed experts of a layer that has run, in lots that are a unit of work each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qtool.engines.native.units import ExpertTask
from qtool.engines.report import ExpertTokens
from qtool.model.experts import Routing
from qtool.model.recorder import Recorder
from qtool.quant.group import needs_tokens
from qtool.recipe.schema import Policy

if TYPE_CHECKING:
    from qtool.engines.native.prepare import Prepared

_LOT_ELEMENTS = 1 << 26  # weights of the experts that make one unit


@dataclass(frozen=True)
class Lot:
    """Some routed experts of a layer.

    Attributes:
        name: of the unit.
        experts: their numbers.
    """

    name: str
    experts: range


@dataclass(frozen=True)
class RoutedLayer:
    """What the routed experts of a layer saw, and what each is to become.

    Attributes:
        index: the layer's number.
        policies: per expert, by gate_proj, up_proj, down_proj.
        recorder: has the tokens.
        routing: which of them go where.
        extra: for experts that saw too few, the numbers of further tokens.
        size: experts of a lot.
    """

    index: int
    policies: list[dict[str, Policy | None]]
    recorder: Recorder
    routing: Routing
    extra: dict[int, torch.Tensor]
    size: int

    def lots(self) -> Iterator[Lot]:
        count = len(self.policies)
        for start in range(0, count, self.size):
            stop = min(start + self.size, count)
            yield Lot(f"experts {start} to {stop - 1}", range(start, stop))

    def task(self, lot: Lot, *, quantize: bool) -> ExpertTask:
        """The unit of a lot; without `quantize` only its output is needed."""
        inputs = self.recorder.inputs([*lot.experts], self.routing, self.extra if quantize else {})
        return ExpertTask(self.index, lot.experts, [self.policies[expert] for expert in lot.experts], inputs, quantize)

    def tokens(self, layer: str) -> ExpertTokens:
        """For the report, under the layer's name."""
        topped_up = {str(expert): len(tokens) for expert, tokens in self.extra.items()}
        return ExpertTokens(layer, self.routing.counts(len(self.policies)), topped_up)


def _policy(planned: Policy | None) -> Policy | None:
    """Runtimes want the experts of a layer alike, and none static: nothing is decided for each."""
    return planned.ways[1] if planned is not None and planned.activations.mode == "auto" else planned


def after_run(prepared: Prepared, index: int, recorder: Recorder, router: torch.Tensor | None) -> RoutedLayer:
    """The routed experts of layer `index`, which has run.

    Args:
        recorder: took their place.
        router: float32 [experts, hidden], if there is one, on any device; chooses the tokens that fill up.
    """
    module = prepared.model.routed(index)
    assert module is not None
    planned = prepared.plan.policies
    policies = [{part: _policy(planned[name]) for part, name in names.parts.items()} for names in module.names]
    routing = recorder.routing(len(policies))
    counts = routing.counts(len(policies))
    enough = prepared.job.recipe.calibration.expert_tokens
    needy = [any(policy and needs_tokens(policy) for policy in own.values()) for own in policies]
    short = [expert for expert, own in enumerate(counts) if needy[expert] and own < enough]
    rows, columns = prepared.model.weights.shape(f"{module.names[0].up}.weight")
    return RoutedLayer(
        index=index,
        policies=policies,
        recorder=recorder,
        routing=routing,
        extra=recorder.likely(short, counts, routing, router, enough),
        size=max(1, _LOT_ELEMENTS // (3 * rows * columns)),
    )
