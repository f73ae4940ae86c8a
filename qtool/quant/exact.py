"""One decoder layer from float to W8A8 step for step as mindspore-gs 1.4.1's OutlierSuppressionLite does it.

Scales are scored by the whole layer's output, weight clipping on the tokens themselves, and the ranges of static
activations are taken once the weights before them are clipped. It needs the layer in float32, all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from qtool.quant import observers, osl, rounding, smoothing
from qtool.quant.integer import fake_quantize_tensor, fake_quantize_tokens
from qtool.quant.layer import GroupReport, LayerResult, Storage, extent, policy_of, static_parameters
from qtool.quant.replay import Recording
from qtool.quant.smoothing import Smoothing
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, bias_of, fold, per_producer_channel, weight_of
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy

Run = Callable[[], torch.Tensor]
_REPORT_TOKENS = 64


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
    storage: Storage,
    runs: Sequence[Run],
) -> LayerResult:
    """Quantize a decoder layer; `layer` is left with the folded float weights.

    Args:
        layer: float32 weights.
        groups: from `topology.find_groups`.
        policies: per linear, by its name inside the layer; None leaves it float.
        statistics: of each group's input on every token, by the name of the group's first linear.
        storage: what the output format keeps.
        runs: one per calibration sample; calls the layer on it and returns its output.
    """
    quantized = [(group, policy) for group in groups if (policy := policy_of(group, policies)) is not None]
    recordings = [Recording(layer, run) for run in runs]
    found = [_smoothing(layer, group, policy, statistics[group.linears[0]], recordings) for group, policy in quantized]
    del recordings
    for (group, _), chosen in zip(quantized, found, strict=True):
        if chosen is not None:
            chosen.s.copy_(_fold_as_stored(layer, group, chosen.s, storage.dtype))
    prepared = [
        _clip(layer, group, policies, statistics[group.linears[0]], chosen, storage)
        for (group, _), chosen in zip(quantized, found, strict=True)
    ]
    _observe_clipped(layer, prepared, runs)
    result = LayerResult()
    for work in prepared:
        _round(layer, work, storage, result)
    return result


@dataclass
class _Work:
    """One group between smoothing and rounding.

    Attributes:
        weight: float32 [sum of out, in], smoothed, the quantized members' rows one below the other.
        sample: float32 [tokens, in], smoothed.
        low, high: the input's extremes, smoothed, float32 [in].
    """

    members: list[str]
    policy: Policy
    smoothing: Smoothing | None
    weight: torch.Tensor
    scales: torch.Tensor
    bounds: torch.Tensor
    sample: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def _smoothing(
    layer: nn.Module, group: Group, policy: Policy, statistics: InputStatistics, recordings: Sequence[Recording]
) -> Smoothing | None:
    if policy.smoothing.method == "none" or group.fold is None:
        return None
    weight = torch.cat([weight_of(layer, name) for name in group.linears])
    act_max = per_producer_channel(group.fold, statistics.amax)
    w_max = per_producer_channel(group.fold, weight.abs().amax(dim=0))
    if policy.smoothing.method == "smoothquant":
        alpha = policy.smoothing.alpha
        return Smoothing(smoothing.scale(act_max, w_max, alpha), alpha)
    return osl.search(recordings, group, act_max, w_max, static=policy.scheme.is_static)


def _fold_as_stored(layer: nn.Module, group: Group, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Fold s, but so that a norm's gain survives storage in `dtype`: the weights take up what rounding it loses."""
    fold_into = group.fold
    if fold_into is None or isinstance(layer.get_submodule(fold_into.producer), nn.Linear):
        fold(layer, group, s)
        return s
    weight = weight_of(layer, fold_into.producer)
    gain = (weight + fold_into.gain_offset)[fold_into.channel_map]
    stored = (gain / s - fold_into.gain_offset).to(dtype).float() + fold_into.gain_offset
    s = torch.where((gain == 0) | (stored == 0), s, gain / stored)
    fold(layer, group, s)
    weight.copy_(weight.to(dtype))
    return s


def _clip(
    layer: nn.Module,
    group: Group,
    policies: Mapping[str, Policy | None],
    statistics: InputStatistics,
    chosen: Smoothing | None,
    storage: Storage,
) -> _Work:
    """Carry the statistics over to the smoothed input, and choose each output channel's clipping ratio."""
    policy = policy_of(group, policies)
    assert policy is not None
    members = [name for name in group.linears if policies[name] is not None]
    weight = torch.cat([weight_of(layer, name) for name in members])
    s = chosen.s if chosen is not None else torch.ones(weight.shape[1], device=weight.device)
    sample = statistics.sample.float() / s
    scales, bounds = rounding.search_clip(
        weight,
        rounding.ErrorOnTokens(sample[:: max(1, statistics.tokens // osl.CLIP_TOKENS)]),
        osl.CLIP_RATIOS if policy.clip else (1.0,),
        lambda scale: storage.weight_scale(scale, policy.scheme),
    )
    return _Work(members, policy, chosen, weight, scales, bounds, sample, statistics.low / s, statistics.high / s)


def _observe_clipped(layer: nn.Module, prepared: Sequence[_Work], runs: Sequence[Run]) -> None:
    """Ranges of the inputs as they are once the weights before them are clipped, for every group."""
    seen = {work.members[0]: InputStatistics(stride=1, with_hessian=False) for work in prepared}
    with ExitStack() as stack:
        for work in prepared:
            start = 0
            for name in work.members:
                weight = weight_of(layer, name)
                end = start + weight.shape[0]
                weight.copy_(rounding.clamp_rows(work.weight[start:end], work.bounds[start:end]))
                start = end
            observed = seen[work.members[0]]
            hook = layer.get_submodule(work.members[0]).register_forward_pre_hook(
                lambda _m, args, observed=observed: observed.update(args[0])
            )
            stack.callback(hook.remove)
        for run in runs:
            run()
    for work in prepared:
        work.low, work.high = seen[work.members[0]].low, seen[work.members[0]].high


def _round(layer: nn.Module, work: _Work, storage: Storage, result: LayerResult) -> None:
    """Fix the activations' range where it is static, round the weights, and note the error."""
    input_scale: float | None = None
    input_zero_point: int | None = None
    if work.policy.activations.mode == "static":
        low, high = observers.static_range(work.low, work.high, work.sample, work.policy.activations.observer)
        input_scale, input_zero_point = static_parameters(low, high, storage)
        noisy = fake_quantize_tensor(work.sample, torch.tensor(input_scale), torch.tensor(float(input_zero_point)))
    else:
        noisy = fake_quantize_tokens(work.sample)
    integers = rounding.integers_within(work.weight, work.scales, work.bounds).to(torch.int8)
    s = work.smoothing.s if work.smoothing is not None else torch.ones_like(work.low)
    few = slice(None, None, max(1, len(noisy) // _REPORT_TOKENS))
    reference = work.sample[few] @ work.weight.t()
    error = (noisy[few] @ (integers * work.scales[:, None]).t()).sub_(reference).square_().sum()
    result.groups.append(
        GroupReport(
            linears=work.members,
            activations=work.policy.activations.mode,
            smoothing=work.policy.smoothing.method if work.smoothing is not None else "none",
            alpha=work.smoothing.alpha if work.smoothing is not None else None,
            relative_error=float(error / reference.square_().sum().clamp(min=1e-30)),
            input=extent(work.low * s, work.high * s),
            smoothed=extent(work.low, work.high),
        )
    )
    start = 0
    for name in work.members:
        bias = bias_of(layer, name)
        end = start + weight_of(layer, name).shape[0]
        result.linears[name] = QuantizedLinear(
            scheme=work.policy.scheme,
            weight=integers[start:end],
            weight_scale=work.scales[start:end],
            bias=None if bias is None else bias.detach().clone(),
            input_scale=input_scale,
            input_zero_point=input_zero_point,
        )
        start = end
