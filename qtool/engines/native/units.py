"""The independent pieces of the work: the linears of one decoder layer, and lots of its routed experts.

Each is a function of a context, which every process has, and a task, which holds all else that it needs; it hands out
its results one by one. So it gives the same in this process, in another, and on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from qtool import transfers
from qtool.engines.native.context import Context
from qtool.engines.native.experts import GATE, ExpertLinears, ExpertSamples, SmoothedExpert, expert_groups
from qtool.engines.native.pieces import Cache, Float, Linear, Output, Piece, Row
from qtool.model.caches import value_linear
from qtool.model.recorder import ExpertInputs
from qtool.model.weights import StoredWeights
from qtool.quant.cache import CacheStatistics, quantize_cache
from qtool.quant.choice import decide
from qtool.quant.group import GroupUnderWay, apart, quantize_group
from qtool.quant.layer import smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group
from qtool.quant.transforms import Folded
from qtool.recipe.schema import Policy
from qtool.transfers import Download

Coming = Callable[[], Iterator[Piece]]
"""Waits for what a device has been asked for."""


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
        caches: of keys and values that are to be quantized, by their attention module's name inside the layer.
    """

    linears: LayerLinears
    statistics: dict[str, InputStatistics]
    caches: dict[str, CacheStatistics] = field(default_factory=dict)


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


def quantize_dense(context: Context, task: DenseTask) -> Iterator[Piece]:
    """Linears and reports of every group, and what smoothing changed in the rest."""
    return _behind(context, _dense(context, task))


def quantize_experts(context: Context, task: ExpertTask) -> Iterator[Piece]:
    """Linears and reports of every expert, then the output of all of them together."""
    return _behind(context, _experts(context, task))


def _behind(context: Context, all_coming: Iterator[Coming]) -> Iterator[Piece]:
    """The pieces of one after the other; a device is asked for the next before the last is waited for."""
    waiting: Coming | None = None
    at_once = not transfers.asynchronous(context.model.device)  # or twice as much would be in memory
    for coming in all_coming:
        if waiting is not None:
            yield from waiting()
        waiting = coming
        if at_once:
            yield from waiting()
            waiting = None
    if waiting is not None:
        yield from waiting()


@torch.no_grad()
def _dense(context: Context, task: DenseTask) -> Iterator[Coming]:
    linears = task.linears
    weights = StoredWeights(context.model.weights, linears.stored)
    storage = context.storage(linears.first_weight)
    statistics = {name: seen.to(context.model.device) for name, seen in task.statistics.items()}
    together = context.model.weights.together
    with together():
        decided = decide(weights, linears.groups, linears.policies, statistics)
        policies = decided.policies
        folded, found = smooth(weights, linears.groups, policies, statistics, storage.dtype, decided.found)
    for group in linears.groups:
        name = group.linears[0]
        for alike in apart(group, policies):
            with together():
                made = context.rows.fit(
                    partial(quantize_group, folded, group, alike, statistics[name], found.get(name), storage)
                )
            names = {linear: linears.name(linear) for linear in group.linears}
            yield partial(_pieces, made, names, static_cost=_cost(linears, alike, decided.costs.get(name)))
    for name in folded.linears:
        if policies.get(name) is None:
            yield _folded_weight(context, folded, name, linears.stored[f"{name}.weight"])
    for attention, seen in task.caches.items():
        assert context.cache is not None
        value = value_linear(attention)
        cache = quantize_cache(seen, context.cache, folded.row_factors(value))
        owner, _, _ = linears.name(value).rpartition(".")
        yield partial(iter, [Cache(owner, cache)])
    changed = {
        linears.stored[name]: tensor
        for name, tensor in folded.changed.items()
        if name.endswith(".weight") or policies.get(name.removesuffix(".bias")) is None
    }
    yield partial(_floats, [*changed], Download([*changed.values()]))


@torch.no_grad()
def _experts(context: Context, task: ExpertTask) -> Iterator[Coming]:
    model, inputs = context.model, task.inputs
    module = model.routed(task.layer)
    assert module is not None
    x = inputs.x.to(model.device)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    per_expert = zip(task.experts, task.policies, inputs.tokens, inputs.weights, inputs.extra, strict=True)
    for number, policies, tokens, weights, extra in per_expert:
        names = module.names[number].parts
        if number + 1 < len(module.names) and transfers.asynchronous(model.device):
            model.checkpoint.expect(f"{name}.weight" for name in module.names[number + 1].parts.values())
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
    # Tokens that stay on the device take up there what is added to them.
    yield partial(_output, Download([output])) if inputs.x.device != output.device else lambda: iter([Output(output)])


def _quantize_expert(context: Context, linears: ExpertLinears, samples: ExpertSamples) -> Iterator[Coming]:
    expert = SmoothedExpert(linears, samples, context.model.weights, context.format, context.rows)
    for made, was_seen in expert.quantize():
        yield partial(_pieces, made, linears.names, reported=was_seen)
    folded = expert.folded
    for part in folded.linears:
        if linears.policies[part] is None:
            yield _folded_weight(context, folded, part, f"{linears.names[part]}.weight")
    changed = {
        f"{linears.names[part]}.bias": tensor
        for name, tensor in folded.changed.items()
        if linears.policies[part := name.removesuffix(".bias")] is None
    }
    yield partial(_floats, [*changed], Download([*changed.values()]))


def _cost(linears: LayerLinears, alike: Mapping[str, Policy | None], cost: float | None) -> float | None:
    """What static activations would cost some of a group's linears; None where there was no choice."""
    chosen = (linears.policies[name] for name, policy in alike.items() if policy is not None)
    return cost if any(policy is not None and policy.activations.mode == "auto" for policy in chosen) else None


def _pieces(
    made: GroupUnderWay, names: dict[str, str], *, reported: bool = True, static_cost: float | None = None
) -> Iterator[Piece]:
    quantized, report = made.result()
    for linear, numbers in quantized.items():
        yield Linear(names[linear], numbers)
    if reported:
        yield Row(replace(report, static_cost=static_cost))


def _floats(names: Sequence[str], download: Download) -> Iterator[Piece]:
    for name, tensor in zip(names, download.result(), strict=True):
        yield Float(name, tensor)


def _output(download: Download) -> Iterator[Piece]:
    (tensor,) = download.result()
    yield Output(tensor)


def _folded_weight(context: Context, folded: Folded, name: str, stored: str) -> Coming:
    """A float linear that took a scale up, in the type that it is stored in."""
    whole = folded.rows(name, 0, folded.shape(name)[0])
    return partial(_floats, [stored], Download([whole.to(context.model.weights.dtype(stored))]))
