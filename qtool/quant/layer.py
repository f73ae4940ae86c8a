"""One decoder layer from float to W8A8: smoothing, folding, clipping, rounding, activation ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from qtool.quant import observers, osl, rounding, smoothing
from qtool.quant.integer import asymmetric_scale_offset, fake_quantize_tensor, fake_quantize_tokens, quantize_rows
from qtool.quant.smoothing import Smoothing
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, fold, per_producer_channel
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy

_FAST_CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8)
_GPTQ_REMAINDER = 0.3  # of the rounding noise that error compensation leaves; measured 0.2 to 0.5 on SmolLM2
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Storage:
    """What a checkpoint format keeps of the numbers, so that integers fit what the runtime will compute with.

    Attributes:
        dtype: of the model's float tensors.
        weight_scale: rounds float32 weight scales [out] of a layer whose activations are static (True) or dynamic.
        input_scale: rounds a static input scale.
    """

    dtype: torch.dtype
    weight_scale: Callable[[torch.Tensor, bool], torch.Tensor]
    input_scale: Callable[[float], float]


@dataclass
class GroupReport:
    """How one group of linears came out; goes into qtool.json."""

    linears: list[str]
    activations: str
    smoothing: str
    alpha: float | None
    relative_error: float


@dataclass
class LayerResult:
    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
    storage: Storage,
    *,
    search: Literal["fast", "exact"],
    runs: Sequence[Run] = (),
) -> LayerResult:
    """Quantize a decoder layer; `layer` is left with the folded float weights.

    Args:
        layer: float32 weights.
        groups: from `topology.find_groups`.
        policies: per linear, by its name inside the layer; None leaves it float.
        statistics: of each group's input, by the name of the group's first linear.
        storage: what the output format keeps.
        search: fast scores a smoothing scale by the group's own output, exact by the layer's, as Golden Stick does.
        runs: for exact only: one per calibration sample, calls the layer on it and returns its output.
    """
    quantized = [group for group in groups if any(policies[name] for name in group.linears)]
    found = {
        group.linears: _smoothing(layer, group, _policy(group, policies), statistics[group.linears[0]], search, runs)
        for group in quantized
    }
    for group in quantized:
        chosen = found[group.linears]
        if chosen is not None:
            chosen.s.copy_(_fold_as_stored(layer, group, chosen.s, storage.dtype))
    result = LayerResult()
    for group in quantized:
        _round_group(layer, group, policies, statistics[group.linears[0]], found[group.linears], storage, search, result)
    return result


def _policy(group: Group, policies: Mapping[str, Policy | None]) -> Policy:
    return next(policy for name in group.linears if (policy := policies[name]) is not None)


def _smoothing(
    layer: nn.Module,
    group: Group,
    policy: Policy,
    statistics: InputStatistics,
    search: Literal["fast", "exact"],
    runs: Sequence[Run],
) -> Smoothing | None:
    if policy.smoothing == "none" or group.producer is None:
        return None
    weight = torch.cat([layer.get_submodule(name).weight for name in group.linears])
    act_max = per_producer_channel(group, statistics.amax)
    w_max = per_producer_channel(group, weight.abs().amax(dim=0))
    static = policy.activations.mode == "static"
    if policy.smoothing == "osl" and search == "exact":
        return osl.search(layer, group, runs, act_max, w_max, static=static)
    if policy.smoothing == "smoothquant":
        alpha = policy.smoothquant_alpha
        return Smoothing(smoothing.scale(act_max, w_max, alpha), alpha)
    assert group.channel_map is not None and statistics.low is not None and statistics.high is not None
    model = smoothing.NoiseModel(
        statistics.sample.float(),
        weight,
        statistics.low,
        statistics.high,
        statistics.energy,
        static=static,
        compensation=_GPTQ_REMAINDER if policy.rounding == "gptq" else 1.0,
    )
    return smoothing.fit(model, act_max, w_max, group.channel_map)


def _fold_as_stored(layer: nn.Module, group: Group, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Fold s, but so that a norm's gain survives storage in `dtype`: the weights take up what rounding it loses."""
    assert group.producer is not None and group.channel_map is not None
    producer = layer.get_submodule(group.producer)
    if not isinstance(producer, nn.Linear):
        gain = (producer.weight.float() + group.gain_offset)[group.channel_map]
        stored = (gain / s - group.gain_offset).to(dtype).float() + group.gain_offset
        s = torch.where((gain == 0) | (stored == 0), s, gain / stored)
    fold(layer, group, s)
    if not isinstance(producer, nn.Linear):
        producer.weight.copy_(producer.weight.to(dtype))
    return s


def _round_group(
    layer: nn.Module,
    group: Group,
    policies: Mapping[str, Policy | None],
    statistics: InputStatistics,
    chosen: Smoothing | None,
    storage: Storage,
    search: Literal["fast", "exact"],
    result: LayerResult,
) -> None:
    policy = _policy(group, policies)
    members = [name for name in group.linears if policies[name] is not None]
    modules = [layer.get_submodule(name) for name in members]
    weight = torch.cat([module.weight for module in modules])
    assert statistics.low is not None and statistics.high is not None
    s = chosen.s if chosen is not None else torch.ones(weight.shape[1], device=weight.device)
    sample = statistics.sample.float() / s
    static = policy.activations.mode == "static"
    input_scale: float | None = None
    input_offset: int | None = None
    if static:
        low, high = observers.static_range(statistics.low / s, statistics.high / s, sample, policy.activations)
        input_scale, input_offset = _static_parameters(low, high, storage)
        scale, offset = torch.tensor(input_scale), torch.tensor(float(input_offset))
        noisy = fake_quantize_tensor(sample, scale, offset)
    else:
        noisy = fake_quantize_tokens(sample)

    gram = None
    if policy.rounding == "gptq" and search == "fast":
        assert statistics.gram is not None
        gram = statistics.gram / s / s[:, None]

    def storable(weight_scale: torch.Tensor) -> torch.Tensor:
        return storage.weight_scale(weight_scale, static)

    if search == "exact":
        stride = max(1, statistics.tokens // osl.CLIP_TOKENS)
        row_error = rounding.error_on_tokens(sample[::stride])
        ratios: Sequence[float] = osl.CLIP_RATIOS
    else:
        row_error = rounding.error_by_energy(statistics.energy / s.square())
        ratios = _FAST_CLIP_RATIOS
    scales = rounding.clipped_scale(weight, row_error, ratios if policy.clip else (1.0,), storable)
    if gram is not None:
        noise = float((noisy - sample).square_().mean())
        integers = rounding.gptq(weight, scales, gram, noise)
    else:
        integers = quantize_rows(weight, scales)

    reference = sample @ weight.t()
    error = (noisy @ (integers * scales[:, None]).t()).sub_(reference).square_().sum()
    result.groups.append(
        GroupReport(
            linears=members,
            activations=policy.activations.mode,
            smoothing=policy.smoothing if chosen is not None else "none",
            alpha=chosen.alpha if chosen is not None else None,
            relative_error=float(error / reference.square_().sum().clamp(min=1e-30)),
        )
    )
    start = 0
    for name, module in zip(members, modules, strict=True):
        end = start + module.weight.shape[0]
        result.linears[name] = QuantizedLinear(
            weight=integers[start:end],
            weight_scale=scales[start:end],
            bias=None if module.bias is None else module.bias.detach().clone(),
            input_scale=input_scale,
            input_offset=input_offset,
        )
        start = end


def _static_parameters(low: float, high: float, storage: Storage) -> tuple[float, int]:
    """Scale as stored, and the zero point that belongs to that scale."""
    scale, _ = asymmetric_scale_offset(torch.tensor(low), torch.tensor(high))
    kept = storage.input_scale(float(scale))
    offset = round(-128 - min(low, 0.0) / kept)
    return kept, max(-128, min(127, offset))
