"""The independent pieces of the work: the linears of one decoder layer, and lots of its routed experts.

Each is a function of a task that holds all it needs besides the checkpoint's files, and hands out its results one by
one; so it gives the same in this process, in another, and on another machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, QtoolError
from qtool.model.decoder import DecoderStream
from qtool.quant.layer import GroupReport, Storage, policy_of, quantize_group, smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, find_groups
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy

PARTS = GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
SAMPLE_TOKENS = 512  # that a group's sample holds
_FEW = 8
_LARGEST = 1e15  # that an activation can be: squares of it, summed over all tokens, are still float32
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
            weight_scale=lambda scale, scheme: output_format.storable_weight_scale(scale, scheme, dtype),
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
        x: the inputs [n, hidden] of all tokens that any of them sees.
        tokens: per expert its tokens' places in x, int64.
        weights: per expert their routing weights.
        extra: per expert the places of further tokens that only its statistics count.
        quantize: False when they are quantized already and only their output is needed.
    """

    source: Source
    index: int
    experts: list[int]
    policies: list[dict[str, Policy | None]]
    x: torch.Tensor
    tokens: list[torch.Tensor]
    weights: list[torch.Tensor]
    extra: list[torch.Tensor]
    quantize: bool


@torch.no_grad()
def quantize_dense(task: DenseTask) -> Iterator[Piece]:
    """Linears and reports of every group, and what smoothing changed in the rest."""
    stream = _stream(task.source)
    weights = StoredWeights(stream.floats, task.stored)
    first = task.stored[f"{task.groups[0].linears[0]}.weight"]
    storage = task.source.storage(stream.floats.dtype(first))
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
    output = torch.zeros(task.x.shape, dtype=torch.float32)
    per_expert = zip(task.experts, task.policies, task.tokens, task.weights, task.extra, strict=True)
    for number, policies, tokens, weights, extra in per_expert:
        names = dict(zip(PARTS, module.names[number], strict=True))
        tensors = [f"{name}.weight" for name in names.values()]
        with stream.floats.holding(tensors):
            seen = (task.x[torch.cat((tokens, extra))] if len(extra) else task.x[tokens]).to(stream.device)
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


def refuse_damage(activations: torch.Tensor, name: str, floats: FloatReader) -> None:
    """Raises InputError when activations of a layer or linear, or their largest magnitudes, can't be true."""
    low, high = activations.aminmax()
    largest = float(torch.maximum(-low, high))
    if largest <= _LARGEST:  # false for NaN
        return
    size = f"as large as {largest:.0e}" if math.isfinite(largest) else "not finite"
    raise InputError(
        f"activations of {name} are {size}; the weights up to there are damaged",
        where=str(floats.checkpoint.path),
        hint="qtool inspect --tensors shows the range of each; download the model again",
    )


def needs_statistics(policy: Policy | None) -> bool:
    """Whether calibration tokens matter to a linear of this policy."""
    return policy is not None and (
        policy.scheme.is_static or policy.smoothing != "none" or policy.clip or policy.rounding == "gptq"
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
    expert = SmoothedExpert(source, stream.floats, names, policies, groups, seen, inner)
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
        floats: the checkpoint.
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
        floats: FloatReader,
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
        weights = StoredWeights(floats, stored)
        self._storage = source.storage(floats.dtype(stored[f"{GATE}.weight"]))
        self._policies = policies
        width = weights.shape(DOWN)[1]
        self._groups = [
            group
            if group.fold is None
            else dataclasses.replace(group, fold=dataclasses.replace(group.fold, channel_map=torch.arange(width)))
            for group in groups
        ]
        self._observed = {name: value for name, value in statistics.items() if value is not None}
        for part, observed in self._observed.items():
            refuse_damage(observed.amax, names[part], floats)
        if len(self._observed) < len(statistics):
            self._groups = [Group(group.linears) for group in groups]  # nothing to find a smoothing scale from
        self.folded, self._found = smooth(weights, self._groups, policies, self._observed, self._storage.dtype)

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


class StoredWeights:
    """The parameters of a decoder layer or an expert, read from the checkpoint as they are needed.

    Args:
        floats: the checkpoint.
        stored: its names of the parameters, by the names to use here.
    """

    def __init__(self, floats: FloatReader, stored: dict[str, str]) -> None:
        self._floats, self._stored = floats, stored

    def shape(self, linear: str) -> tuple[int, int]:
        out, width = self._floats.checkpoint.info(self._stored[f"{linear}.weight"]).shape
        return out, width

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        name = self._stored[f"{linear}.weight"]
        step = self._floats.row_step(name)
        if stop - start <= step:
            return self._floats.rows(name, start, stop)
        out = torch.empty(stop - start, self.shape(linear)[1])
        # From the first row of a block on, so that no block of scales is read twice.
        first = start
        while first < stop:
            last = min(stop, first - first % step + step)
            out[first - start : last - start] = self._floats.rows(name, first, last)
            first = last
        return out

    def vector(self, name: str) -> torch.Tensor | None:
        stored = self._stored.get(name)
        if stored is None or len(self._floats.checkpoint.info(stored).shape) != 1:
            return None
        return self._floats.tensor(stored).float()


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
