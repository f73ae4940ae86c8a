"""The independent pieces of the work: the linears of one decoder layer, and lots of its routed experts.

Each is a function of a context, which every process has, and a task, which holds all else that it needs; it hands out
its results one by one. So it gives the same in this process, in another, and on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qtool.engines.native.context import Context
from qtool.engines.native.experts import GATE, ExpertLinears, ExpertSamples, SmoothedExpert, expert_groups
from qtool.engines.native.pieces import Float, Linear, Output, Piece, Row
from qtool.model.recorder import ExpertInputs
from qtool.model.weights import StoredWeights
from qtool.quant.group import policy_of, quantize_group
from qtool.quant.layer import smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group
from qtool.quant.transforms import Folded
from qtool.recipe.schema import Policy


@dataclass(frozen=True)
class LayerLinears:
    """The linears of one decoder layer, without routed experts, by their names inside it.

    Attributes:
        groups: that share their input, in call order.
        policies: None leaves a linear float.
        stored: the checkpoint's names of the layer's parameters.
    """

    groups: Sequence[Group]
    policies: dict[str, Policy | None]
    stored: dict[str, str]

    @property
    def first_weight(self) -> str:
        """The checkpoint's name of a weight whose type stands for the layer's."""
        return self.stored[f"{self.groups[0].linears[0]}.weight"]

    def name(self, linear: str) -> str:
        """The checkpoint's name of a linear, without ".weight"."""
        return self.stored[f"{linear}.weight"].removesuffix(".weight")


@dataclass(frozen=True)
class DenseTask:
    """The linears of one decoder layer, without routed experts.

    Attributes:
        statistics: of each group's input, by the group's first linear.
    """

    linears: LayerLinears
    statistics: dict[str, InputStatistics]


@dataclass(frozen=True)
class ExpertTask:
    """Some routed experts of one layer.

    Attributes:
        layer: its number.
        experts: their numbers.
        policies: per expert, by gate_proj, up_proj, down_proj.
        inputs: what they see.
        quantize: False when they are quantized already and only their output is needed.
    """

    layer: int
    experts: Sequence[int]
    policies: Sequence[dict[str, Policy | None]]
    inputs: ExpertInputs
    quantize: bool


@torch.no_grad()
def quantize_dense(context: Context, task: DenseTask) -> Iterator[Piece]:
    """Linears and reports of every group, and what smoothing changed in the rest."""
    linears, policies = task.linears, task.linears.policies
    weights = StoredWeights(context.model.weights, linears.stored)
    storage = context.storage(linears.first_weight)
    statistics = {name: seen.to(context.model.device) for name, seen in task.statistics.items()}
    folded, found = smooth(weights, linears.groups, policies, statistics, storage.dtype)
    for group in linears.groups:
        name = group.linears[0]
        if policy_of(group, policies) is None:
            continue
        made, report = quantize_group(folded, group, policies, statistics[name], found.get(name), storage)
        for linear, quantized in made.items():
            yield Linear(linears.name(linear), quantized)
        yield Row(report)
    for name in folded.linears:
        if policies.get(name) is None:
            yield _folded_weight(context, folded, name, linears.stored[f"{name}.weight"])
    for name, tensor in folded.changed.items():
        if name.endswith(".weight") or policies.get(name.removesuffix(".bias")) is None:
            yield Float(linears.stored[name], tensor.cpu())


@torch.no_grad()
def quantize_experts(context: Context, task: ExpertTask) -> Iterator[Piece]:
    """Linears and reports of every expert, then the output of all of them together."""
    model, inputs = context.model, task.inputs
    module = model.routed(task.layer)
    assert module is not None
    x = inputs.x.to(model.device)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    per_expert = zip(task.experts, task.policies, inputs.tokens, inputs.weights, inputs.extra, strict=True)
    for number, policies, tokens, weights, extra in per_expert:
        names = module.names[number].parts
        with model.weights.holding([f"{name}.weight" for name in names.values()]):
            tokens, weights = tokens.to(x.device), weights.to(x.device)
            seen = x[torch.cat((tokens, extra.to(x.device)))] if len(extra) else x[tokens]
            inner = None
            if len(seen):
                expert = module.expert(number)
                inner = expert.inner(seen)
                if len(tokens):
                    routed = expert.output(inner[: len(tokens)]).float() * weights[:, None].float()
                    output.index_add_(0, tokens, routed)
                del expert
            if task.quantize:
                linears = ExpertLinears(names, policies, expert_groups(module.apply_gate, has_gate=GATE in names))
                yield from _quantize_expert(context, linears, ExpertSamples(seen, inner))
    yield Output(output.cpu())


def _quantize_expert(context: Context, linears: ExpertLinears, samples: ExpertSamples) -> Iterator[Piece]:
    expert = SmoothedExpert(linears, samples, context.model.weights, context.format)
    for made, report in expert.quantize():
        for part, quantized in made.items():
            yield Linear(linears.names[part], quantized)
        if report is not None:
            yield Row(report)
    folded = expert.folded
    for part in folded.linears:
        if linears.policies[part] is None:
            yield _folded_weight(context, folded, part, f"{linears.names[part]}.weight")
    for name, tensor in folded.changed.items():
        part = name.removesuffix(".bias")
        if linears.policies[part] is None:
            yield Float(f"{linears.names[part]}.bias", tensor.cpu())


def _folded_weight(context: Context, folded: Folded, name: str, stored: str) -> Float:
    """A float linear that took a scale up, in the type that it is stored in."""
    whole = folded.rows(name, 0, folded.shape(name)[0])
    return Float(stored, whole.to(context.model.weights.dtype(stored)).cpu())
