"""The independent pieces of the work: the linears of one decoder layer, and lots of its routed experts.

Each is a function of a task that holds all it needs besides the checkpoint's files, and hands out its results one by
one; so it gives the same in this process, in another, and on another machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, QtoolError
from qtool.model.decoder import DecoderStream
from qtool.model.recorder import ExpertInputs
from qtool.model.weights import ModelWeights, StoredWeights, refuse_damage
from qtool.quant.layer import GroupReport, Storage, policy_of, quantize_group, smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, find_groups
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy

PARTS = GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
SAMPLE_TOKENS = 512  # that a group's sample holds
_FEW = 8
Gate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """What every task needs to know of the job.

    Attributes:
        model: the checkpoint's folder.
        dtype: compute type.
        device: where to compute.
        trust_remote_code: allow the checkpoint's own modelling code.
        format: name of the output's format.
        threads: how many to compute with; results depend on it in the last bits.
    """

    model: str
    dtype: torch.dtype
    device: str
    trust_remote_code: bool
    format: str
    threads: int

    def storage(self, dtype: torch.dtype) -> Storage:
        """Of a layer whose float tensors are `dtype`."""
        output_format = formats.get(self.format)
        return Storage(
            dtype=dtype,
            weight_scale=lambda scale, static: output_format.storable_weight_scale(
                scale, "static" if static else "dynamic", dtype
            ),
            input_scale=lambda scale: output_format.storable_scale(scale, dtype),
        )


class Linear(NamedTuple):
    """A quantized linear to write, under the checkpoint's name without ".weight"."""

    name: str
    linear: QuantizedLinear


class Float(NamedTuple):
    """A float tensor to write in place of the checkpoint's of this name, float32."""

    name: str
    tensor: torch.Tensor


class Output(NamedTuple):
    """What a lot of experts adds to the layer's output: float32 [n, hidden], for the task's tokens."""

    tensor: torch.Tensor


class Row(NamedTuple):
    """How a group came out."""

    report: GroupReport


Piece = Linear | Float | Output | Row


@dataclass(frozen=True)
class DenseTask:
    """The linears of one decoder layer, without routed experts.

    Attributes:
        groups, policies: by names inside the layer.
        statistics: of each group's input, by the group's first linear.
        stored: the checkpoint's names of the layer's parameters.
    """

    source: Source
    groups: Sequence[Group]
    policies: dict[str, Policy | None]
    statistics: dict[str, InputStatistics]
    stored: dict[str, str]


@dataclass(frozen=True)
class ExpertTask:
    """Some routed experts of one layer.

    Attributes:
        index: the layer's number.
        experts: their numbers.
        policies: per expert, by gate_proj, up_proj, down_proj.
        inputs: what they see.
        quantize: False when they are quantized already and only their output is needed.
    """

    source: Source
    index: int
    experts: list[int]
    policies: list[dict[str, Policy | None]]
    inputs: ExpertInputs
    quantize: bool


@torch.no_grad()
def quantize_dense(task: DenseTask) -> Iterator[Piece]:
    """Linears and reports of every group, and what smoothing changed in the rest."""
    stream = _stream(task.source)
    weights = StoredWeights(stream.weights, task.stored)
    first = task.stored[f"{task.groups[0].linears[0]}.weight"]
    storage = task.source.storage(stream.weights.dtype(first))
    folded, found = smooth(weights, task.groups, task.policies, task.statistics, storage.dtype)
    for group in task.groups:
        name = group.linears[0]
        if policy_of(group, task.policies) is None:
            continue
        linears, report = quantize_group(folded, group, task.policies, task.statistics[name], found.get(name), storage)
        for linear, quantized in linears.items():
            yield Linear(task.stored[f"{linear}.weight"].removesuffix(".weight"), quantized)
        yield Row(report)
    for name in folded.linears:
        if task.policies.get(name) is None:
            yield Float(task.stored[f"{name}.weight"], folded.rows(name, 0, folded.shape(name)[0]))
    for name, tensor in folded.changed.items():
        if name.endswith(".weight") or task.policies.get(name.removesuffix(".bias")) is None:
            yield Float(task.stored[name], tensor)


@torch.no_grad()
def quantize_experts(task: ExpertTask) -> Iterator[Piece]:
    """Linears and reports of every expert, then the output of all of them together."""
    stream = _stream(task.source)
    module = stream.routed(task.index)
    assert module is not None
    inputs = task.inputs
    output = torch.zeros(inputs.x.shape, dtype=torch.float32)
    per_expert = zip(task.experts, task.policies, inputs.tokens, inputs.weights, inputs.extra, strict=True)
    for number, policies, tokens, weights, extra in per_expert:
        names = dict(zip(PARTS, module.names[number], strict=True))
        tensors = [f"{name}.weight" for name in names.values()]
        with stream.weights.holding(tensors):
            seen = (inputs.x[torch.cat((tokens, extra))] if len(extra) else inputs.x[tokens]).to(stream.device)
            inner = None
            if len(seen):
                expert = stream.expert(module, number)
                inner = expert.inner(seen)
                if len(tokens):
                    routed = expert.output(inner[: len(tokens)]).float().cpu() * weights[:, None].float()
                    output.index_add_(0, tokens, routed)
                del expert
            if task.quantize:
                groups = expert_groups(module.apply_gate)
                yield from _quantize_expert(task.source, stream, names, policies, groups, seen, inner)
    yield Output(output)


def needs_statistics(policy: Policy | None) -> bool:
    """Whether calibration tokens matter to a linear of this policy."""
    return policy is not None and (
        policy.activations.mode == "static" or policy.smoothing != "none" or policy.clip or policy.rounding == "gptq"
    )


def _quantize_expert(
    source: Source,
    stream: DecoderStream,
    names: dict[str, str],
    policies: dict[str, Policy | None],
    groups: Sequence[Group],
    seen: torch.Tensor,
    inner: torch.Tensor | None,
) -> Iterator[Piece]:
    expert = SmoothedExpert(source, stream.weights, names, policies, groups, seen, inner)
    for linears, report in expert.quantize():
        for part, quantized in linears.items():
            yield Linear(names[part], quantized)
        if report is not None:
            yield Row(report)
    folded = expert.folded
    for part in folded.linears:
        if policies[part] is None:
            yield Float(f"{names[part]}.weight", folded.rows(part, 0, folded.shape(part)[0]))


class SmoothedExpert:
    """A routed expert with its smoothing scales folded in, ready to be quantized.

    Args:
        source: of the job.
        weights: of the model.
        names: the checkpoint's names, without ".weight", by gate_proj, up_proj, down_proj.
        policies: by the same.
        groups: from `expert_groups`.
        seen: calibration tokens [n, hidden]; n may be 0.
        inner: what enters down_proj for them [n, intermediate]; None for no tokens.

    Raises InputError when the tokens' activations can't be true.

    Attributes:
        folded: its float weights, by gate_proj, up_proj, down_proj.
    """

    def __init__(
        self,
        source: Source,
        weights: ModelWeights,
        names: dict[str, str],
        policies: dict[str, Policy | None],
        groups: Sequence[Group],
        seen: torch.Tensor,
        inner: torch.Tensor | None,
    ) -> None:
        statistics = {
            GATE: _statistics((policies[GATE], policies[UP]), seen),
            DOWN: _statistics((policies[DOWN],), inner),
        }
        stored = {f"{part}.weight": f"{name}.weight" for part, name in names.items()}
        own = StoredWeights(weights, stored)
        self._storage = source.storage(weights.dtype(stored[f"{GATE}.weight"]))
        self._policies = policies
        width = own.shape(DOWN)[1]
        self._groups = [
            group
            if group.fold is None
            else dataclasses.replace(group, fold=dataclasses.replace(group.fold, channel_map=torch.arange(width)))
            for group in groups
        ]
        self._observed = {name: value for name, value in statistics.items() if value is not None}
        for part, observed in self._observed.items():
            refuse_damage(observed.amax, names[part], weights)
        if len(self._observed) < len(statistics):
            self._groups = [Group(group.linears) for group in groups]  # nothing to find a smoothing scale from
        self.folded, self._found = smooth(own, self._groups, policies, self._observed, self._storage.dtype)

    def quantize(self) -> Iterator[tuple[dict[str, QuantizedLinear], GroupReport | None]]:
        """The linears of each group that its policy quantizes; no report where no token was seen."""
        for group in self._groups:
            if policy_of(group, self._policies) is None:
                continue
            name = group.linears[0]
            seen = self._observed.get(name) or InputStatistics.empty(self.folded.shape(name)[1])
            linears, report = quantize_group(
                self.folded, group, self._policies, seen, self._found.get(name), self._storage
            )
            yield linears, report if name in self._observed else None


def _statistics(policies: Sequence[Policy | None], x: torch.Tensor | None) -> InputStatistics | None:
    """Of the tokens x [n, in]; None when there are none."""
    if x is None or not len(x):
        return None
    with_gram = any(policy is not None and policy.rounding == "gptq" for policy in policies)
    observed = InputStatistics(stride=max(1, len(x) // SAMPLE_TOKENS), with_gram=with_gram, gram_stride=1)
    observed.update(x)
    return observed


class _Small(nn.Module):
    """An expert of a few channels, to probe what its scales can be folded into."""

    def __init__(self, apply_gate: Gate) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(_FEW, _FEW, bias=False) for _ in range(3))
        self._apply_gate = apply_gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._apply_gate(torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)))


@lru_cache(maxsize=1)
def expert_groups(apply_gate: Gate) -> list[Group]:
    """The groups of an expert: gate and up, and down, whose scale folds into up unless the gate clamps it.

    The channel map is left at a few channels: channel i of down is channel i of up.
    """
    generator = torch.Generator().manual_seed(0)
    small = _Small(apply_gate)
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, 4, _FEW, generator=generator)
    return find_groups(small, lambda: small(x))


@lru_cache(maxsize=1)
def _stream(source: Source) -> DecoderStream:
    """The model of a task, opened once in a process. Raises QtoolError, since the job itself could open it before."""
    torch.set_num_threads(source.threads)
    try:
        return DecoderStream(
            Checkpoint.open(source.model),
            dtype=source.dtype,
            device=source.device,
            trust_remote_code=source.trust_remote_code,
        )
    except InputError as error:
        raise QtoolError(error.what, where=error.where, hint=error.hint) from error
