"""One decoder layer from float to W8A8: smoothing, folding, clipping, rounding, activation ranges.

Weights come a few rows at a time from a `Weights`, and the layer's groups one after the other, so that a layer of any
size is quantized in the memory of one group's statistics and a few rows. (`exact` is Golden Stick's way instead.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from qtool.quant import observers, rounding, smoothing
from qtool.quant.integer import asymmetric_scale_offset, fake_quantize_tensor, fake_quantize_tokens
from qtool.quant.smoothing import Smoothing
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, per_producer_channel
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy
from qtool.scheme import Scheme

_CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8)
# Weights that are in float32 at a time: what the cache takes; error compensation needs more rows to be worth its steps.
_CHUNK, _COMPENSATED_CHUNK = 1 << 22, 1 << 24
_MODEL_ROWS = 1 << 24  # elements of the rows that the search for a smoothing scale looks at
_REPORT_TOKENS = 32  # that the reported error of a group is measured on
_GPTQ_REMAINDER = 0.3  # of the rounding noise that error compensation leaves; measured 0.2 to 0.5 on SmolLM2


class Weights(Protocol):
    """The float parameters of a decoder layer, by their names inside it."""

    def shape(self, linear: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        ...

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a linear's weight, float32 [stop - start, in]."""
        ...

    def vector(self, name: str) -> torch.Tensor | None:
        """A norm's gain, or any bias, float32, by its name; None when there is none, or it is a matrix."""
        ...


@dataclass(frozen=True)
class Storage:
    """What a checkpoint format keeps of the numbers, so that integers fit what the runtime will compute with.

    Attributes:
        dtype: of the model's float tensors.
        weight_scale: rounds float32 weight scales [out] of a layer of this scheme.
        input_scale: rounds a static input scale.
    """

    dtype: torch.dtype
    weight_scale: Callable[[torch.Tensor, Scheme], torch.Tensor]
    input_scale: Callable[[float], float]


@dataclass
class GroupReport:
    """How one group of linears came out; goes into qtool.json.

    Attributes:
        input, smoothed: the input's range on the calibration text before and after smoothing, as "low", "high" and
            "typical", the median over channels of the largest magnitude.
    """

    linears: list[str]
    activations: str
    smoothing: str
    alpha: float | None
    relative_error: float
    input: dict[str, float]
    smoothed: dict[str, float]


@dataclass
class LayerResult:
    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)


class Folded:
    """A layer's parameters with smoothing scales folded in, computed as they are read.

    Attributes:
        changed: new values of norm gains and biases, float32, by name.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._columns: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self.changed: dict[str, torch.Tensor] = {}

    @property
    def linears(self) -> set[str]:
        """The linears whose weights differ from the original ones."""
        return {*self._columns, *self._rows}

    def shape(self, linear: str) -> tuple[int, int]:
        return self._weights.shape(linear)

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        weight = self._weights.rows(linear, start, stop)
        if linear in self._columns:
            weight = weight * self._columns[linear]
        if linear in self._rows:
            weight = weight * self._rows[linear][start:stop, None]
        return weight

    def vector(self, name: str) -> torch.Tensor | None:
        return self.changed[name] if name in self.changed else self._weights.vector(name)

    def columns(self, linear: str) -> torch.Tensor | None:
        """The smoothing scale of a linear's input, float32 [in], if any."""
        return self._columns.get(linear)

    def fold(self, group: Group, s: torch.Tensor, dtype: torch.dtype) -> None:
        """Multiply the group's weights by s [in] per input channel, and divide what produces its input by it.

        Where that is a norm, its gain must survive storage in `dtype`: the weights take up what rounding it loses.
        """
        target = group.fold
        if target is None:
            raise ValueError(f"{group.linears} has no producer to fold into")
        gain = self.vector(f"{target.producer}.weight")  # None for a linear, whose weight is no vector
        width = self.shape(target.producer)[0] if gain is None else len(gain)
        if gain is not None:
            old = (gain + target.gain_offset)[target.channel_map]
            kept = (old / s - target.gain_offset).to(dtype).float() + target.gain_offset
            s = torch.where((old == 0) | (kept == 0), s, old / kept)
        inverse = torch.ones(width, device=s.device)
        inverse[target.channel_map] = 1 / s
        if gain is None:
            self._rows[target.producer] = self._rows.get(target.producer, 1) * inverse
        else:
            folded = (gain + target.gain_offset) * inverse - target.gain_offset
            self.changed[f"{target.producer}.weight"] = folded.to(dtype).float()
        bias = self.vector(f"{target.producer}.bias")
        if bias is not None:
            self.changed[f"{target.producer}.bias"] = bias * inverse
        for name in group.linears:
            self._columns[name] = s


@torch.no_grad()
def smooth(
    weights: Weights,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
    dtype: torch.dtype,
) -> tuple[Folded, dict[str, Smoothing]]:
    """Find every group's smoothing scale on the untouched layer, then fold them all.

    Args:
        weights: of the layer.
        groups: from `topology.find_groups`.
        policies: per linear, by its name inside the layer; None leaves it float.
        statistics: of each group's input, by the name of the group's first linear.
        dtype: of the model's float tensors.

    Returns:
        The folded weights, and the scales found by the name of their group's first linear.
    """
    folded, found = Folded(weights), {}
    for group in groups:
        policy = policy_of(group, policies)
        if policy is None or policy.smoothing.method == "none" or group.fold is None:
            continue
        found[group.linears[0]] = _search(weights, group, policy, statistics[group.linears[0]])
    for group in groups:
        if group.linears[0] in found:
            folded.fold(group, found[group.linears[0]].s, dtype)
    return folded, found


@torch.no_grad()
def quantize_group(
    folded: Folded,
    group: Group,
    policies: Mapping[str, Policy | None],
    statistics: InputStatistics,
    chosen: Smoothing | None,
    storage: Storage,
) -> tuple[dict[str, QuantizedLinear], GroupReport]:
    """Quantize the linears of one group whose policy says so.

    Args:
        folded, chosen: from `smooth`; chosen is None for a group without smoothing.
        group, policies: as there.
        statistics: of the group's input.
        storage: what the output format keeps.
    """
    policy = policy_of(group, policies)
    assert policy is not None
    members = [name for name in group.linears if policies[name] is not None]
    s = folded.columns(members[0])
    sample = statistics.sample.float() if s is None else statistics.sample.float() / s
    low, high = statistics.low, statistics.high
    before = extent(low, high)
    if s is not None:
        low, high = low / s, high / s
    input_scale: float | None = None
    input_zero_point: int | None = None
    if policy.activations.mode == "static":
        input_scale, input_zero_point = static_parameters(
            *observers.static_range(low, high, sample, policy.activations.observer), storage
        )
        noisy = fake_quantize_tensor(sample, torch.tensor(input_scale), torch.tensor(float(input_zero_point)))
    else:
        noisy = fake_quantize_tokens(sample)
    compensation = None
    if needs_hessian(policy):
        noise = float((noisy - sample).square_().mean())
        gram = statistics.hessian if s is None else statistics.hessian / s / s[:, None]
        compensation = rounding.Compensation(gram, noise)
    row_error = None
    if policy.clip:
        row_error = rounding.ErrorByEnergy(statistics.energy if s is None else statistics.energy / s.square())

    few = slice(None, None, max(1, len(sample) // _REPORT_TOKENS))
    sample, noisy = sample[few], noisy[few]
    error = signal = 0.0
    integers = {name: torch.empty(folded.shape(name), dtype=torch.int8) for name in members}
    scales = {name: torch.empty(folded.shape(name)[0]) for name in members}
    shapes = [(name, *folded.shape(name)) for name in members]
    for chunk in _chunks(shapes, _CHUNK if compensation is None else _COMPENSATED_CHUNK):
        parts = [folded.rows(name, start, stop) for name, start, stop in chunk]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        scale, bound = rounding.search_clip(
            weight,
            row_error,
            _CLIP_RATIOS if row_error else (1.0,),
            lambda scale: storage.weight_scale(scale, policy.scheme),
        )
        if compensation is not None:
            rounded = compensation.round(weight, scale)
        else:
            rounded = rounding.integers_within(weight, scale, bound).to(torch.int8)
        reference = sample @ weight.t()
        error += float((noisy @ (rounded * scale[:, None]).t()).sub_(reference).square_().sum())
        signal += float(reference.square_().sum())
        first = 0
        for name, start, stop in chunk:
            last = first + stop - start
            integers[name][start:stop] = rounded[first:last]
            scales[name][start:stop] = scale[first:last]
            first = last
    linears = {
        name: QuantizedLinear(
            scheme=policy.scheme,
            weight=integers[name],
            weight_scale=scales[name],
            bias=folded.vector(f"{name}.bias"),
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )
        for name in members
    }
    report = GroupReport(
        linears=members,
        activations=policy.activations.mode,
        smoothing=policy.smoothing.method if chosen is not None else "none",
        alpha=chosen.alpha if chosen is not None else None,
        relative_error=error / max(signal, 1e-30),
        input=before,
        smoothed=extent(low, high),
    )
    return linears, report


def policy_of(group: Group, policies: Mapping[str, Policy | None]) -> Policy | None:
    """The policy of a group's quantized members; None when there are none."""
    return next((policy for name in group.linears if (policy := policies[name]) is not None), None)


def needs_hessian(policy: Policy) -> bool:
    """Whether `quantize_group` wants the Hessian of the group's input."""
    return policy.rounding.method == "gptq"


def needs_tokens(policy: Policy) -> bool:
    """Whether what comes out depends on calibration tokens at all."""
    return policy.scheme.is_static or policy.smoothing.method != "none" or policy.clip or needs_hessian(policy)


def extent(low: torch.Tensor, high: torch.Tensor) -> dict[str, float]:
    """Per-channel extremes [in] in three numbers, for a report."""
    typical = torch.maximum(low.abs(), high.abs()).median()
    return {"low": float(low.min()), "high": float(high.max()), "typical": float(typical)}


def static_parameters(low: float, high: float, storage: Storage) -> tuple[float, int]:
    """Scale as stored, and the zero point that belongs to that scale."""
    scale, _ = asymmetric_scale_offset(torch.tensor(low), torch.tensor(high))
    kept = storage.input_scale(float(scale))
    offset = round(-128 - min(low, 0.0) / kept)
    return kept, max(-128, min(127, offset))


def _search(weights: Weights, group: Group, policy: Policy, statistics: InputStatistics) -> Smoothing:
    """The group's smoothing scale."""
    assert group.fold is not None
    shapes = [(name, *weights.shape(name)) for name in group.linears]
    stride = max(1, sum(out * width for _, out, width in shapes) // _MODEL_ROWS)
    maximum = torch.zeros(shapes[0][2])
    energy = torch.zeros(shapes[0][2])
    some = []
    for chunk in _chunks(shapes, _CHUNK):
        for name, start, stop in chunk:
            rows = weights.rows(name, start, stop)
            some.append(rows[::stride].clone() if stride > 1 else rows)
            maximum = torch.maximum(maximum, rows.abs().amax(dim=0))
            energy += rows.square().sum(dim=0)
    act_max = per_producer_channel(group.fold, statistics.amax)
    w_max = per_producer_channel(group.fold, maximum)
    if policy.smoothing.method == "smoothquant":
        alpha = policy.smoothing.alpha
        return Smoothing(smoothing.scale(act_max, w_max, alpha), alpha)
    model = smoothing.NoiseModel(
        statistics.sample.float(),
        torch.cat(some),
        statistics.low,
        statistics.high,
        statistics.energy,
        static=policy.scheme.is_static,
        compensation=stride * (_GPTQ_REMAINDER if needs_hessian(policy) else 1.0),
        weight_energy=energy,
    )
    return smoothing.fit(model, act_max, w_max, group.fold.channel_map)


def _chunks(shapes: Sequence[tuple[str, int, int]], elements: int) -> Iterator[list[tuple[str, int, int]]]:
    """(linear, first row, last row) in lots of about so many elements; linears (name, out, in) share a width."""
    chunk: list[tuple[str, int, int]] = []
    room = capacity = max(1, elements // shapes[0][2])
    for name, count, _ in shapes:
        start = 0
        while start < count:
            stop = min(count, start + room)
            chunk.append((name, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], capacity
    if chunk:
        yield chunk


class ModuleWeights:
    """The parameters of a decoder layer that is in memory in float32."""

    def __init__(self, layer: nn.Module) -> None:
        self._parameters = dict(layer.named_parameters())

    def shape(self, linear: str) -> tuple[int, int]:
        out, width = self._parameters[f"{linear}.weight"].shape
        return out, width

    def rows(self, linear: str, start: int, stop: int) -> torch.Tensor:
        return self._parameters[f"{linear}.weight"][start:stop].detach()

    def vector(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters.get(name)
        return None if parameter is None or parameter.dim() != 1 else parameter.detach()


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
    storage: Storage,
) -> LayerResult:
    """Quantize a decoder layer in memory, and leave it with the folded float weights.

    Args:
        layer: float32 weights.
        groups, policies, statistics: as for `smooth`.
        storage: what the output format keeps.
    """
    folded, found = smooth(ModuleWeights(layer), groups, policies, statistics, storage.dtype)
    result = LayerResult()
    for group in groups:
        first = group.linears[0]
        if policy_of(group, policies) is not None:
            linears, report = quantize_group(folded, group, policies, statistics[first], found.get(first), storage)
            result.linears |= linears
            result.groups.append(report)
    changed = {f"{name}.weight": folded.rows(name, 0, folded.shape(name)[0]) for name in folded.linears}
    for name, tensor in (changed | folded.changed).items():
        layer.get_parameter(name).copy_(tensor)
    return result
