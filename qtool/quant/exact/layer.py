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

from qtool.errors import InputError
from qtool.quant.exact.replay import Recording
from qtool.quant.exact.search import CLIP_RATIOS, CLIP_TOKENS, search
from qtool.quant.group import Storage, apart, input_quantizer, policy_of
from qtool.quant.layer import LayerResult
from qtool.quant.report import extent, extremes, report
from qtool.quant.rounding.clipping import Scales, ScaleSearch
from qtool.quant.rounding.errors import ErrorOnTokens
from qtool.quant.rounding.nearest import clamp_rows, round_to_nearest
from qtool.quant.statistics import InputStatistics, Smoothed
from qtool.quant.topology import Group, bias_of, fold, per_producer_channel, weight_of
from qtool.quant.transforms import Diagonal, transform_of
from qtool.quant.types import QuantizedLinear, dequantize
from qtool.quant.weights import ModuleWeights
from qtool.recipe.policy import Policy

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

    Raises ValueError for weights that don't have one scale per output channel, InputError for linears that share their
    input and not their policy.
    """
    for group in groups:
        if len(apart(group, policies)) > 1:
            what = f"{', '.join(group.linears)} share their input, and osl: exact quantizes them in one way only"
            raise InputError(what, where="recipe", hint="Use osl: fast, or give them one policy.")
    quantized = [(group, policy) for group in groups if (policy := policy_of(group, policies)) is not None]
    if any(policy.scheme.weights.strategy != "channel" for _, policy in quantized):
        raise ValueError("exact OSL knows weights with a scale per output channel only")
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
        inputs: the smoothed input.
    """

    members: list[str]
    policy: Policy
    diagonal: Diagonal | None
    weight: torch.Tensor
    scales: Scales
    inputs: Smoothed


def _smoothing(
    layer: nn.Module, group: Group, policy: Policy, statistics: InputStatistics, recordings: Sequence[Recording]
) -> Diagonal | None:
    transform = transform_of(policy)
    if transform is None or group.fold is None:
        return None
    if policy.smoothing.method != "osl":
        return transform.fit(ModuleWeights(layer), group, statistics)
    weight = torch.cat([weight_of(layer, name) for name in group.linears])
    act_max = per_producer_channel(group.fold, statistics.amax)
    w_max = per_producer_channel(group.fold, weight.abs().amax(dim=0))
    return search(recordings, group, act_max, w_max, policy.scheme)


def _fold_as_stored(layer: nn.Module, group: Group, s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Fold s, but so that a norm's gain survives storage in `dtype`: the weights take up what rounding it loses."""
    target = group.fold
    if target is None or isinstance(layer.get_submodule(target.producer), nn.Linear):
        fold(layer, group, s)
        return s
    weight = weight_of(layer, target.producer)
    gain = (weight + target.gain_offset)[target.channel_map]
    stored = (gain / s - target.gain_offset).to(dtype).float() + target.gain_offset
    s = torch.where((gain == 0) | (stored == 0), s, gain / stored)
    fold(layer, group, s)
    weight.copy_(weight.to(dtype))
    return s


def _clip(
    layer: nn.Module,
    group: Group,
    policies: Mapping[str, Policy | None],
    statistics: InputStatistics,
    chosen: Diagonal | None,
    storage: Storage,
) -> _Work:
    """Carry the statistics over to the smoothed input, and choose each output channel's clipping ratio."""
    policy = policy_of(group, policies)
    assert policy is not None
    members = [name for name in group.linears if policies[name] is not None]
    weight = torch.cat([weight_of(layer, name) for name in members])
    inputs = statistics.smoothed(None if chosen is None else chosen.s)
    found = ScaleSearch(
        args=policy.scheme.weights,
        ratios=CLIP_RATIOS if policy.clip else (1.0,),
        error=ErrorOnTokens(inputs.sample[:: max(1, statistics.tokens // CLIP_TOKENS)]),
        storable=lambda scale: storage.weight_scale(scale, policy.scheme),
    )
    return _Work(members, policy, chosen, weight, found.of_rows(weight), inputs)


def _observe_clipped(layer: nn.Module, prepared: Sequence[_Work], runs: Sequence[Run]) -> None:
    """Ranges of the inputs as they are once the weights before them are clipped, for every group."""
    seen = {work.members[0]: InputStatistics(stride=1, with_hessian=False) for work in prepared}
    with ExitStack() as stack:
        for work in prepared:
            start = 0
            for name in work.members:
                weight = weight_of(layer, name)
                end = start + weight.shape[0]
                weight.copy_(clamp_rows(work.weight[start:end], work.scales.bound[start:end]))
                start = end
            observed = seen[work.members[0]]
            hook = layer.get_submodule(work.members[0]).register_forward_pre_hook(
                lambda _m, args, observed=observed: observed.update(args[0])
            )
            stack.callback(hook.remove)
        for run in runs:
            run()
    for work in prepared:
        work.inputs.low, work.inputs.high = seen[work.members[0]].low, seen[work.members[0]].high


def _round(layer: nn.Module, work: _Work, storage: Storage, result: LayerResult) -> None:
    """Fix the activations' range where it is static, round the weights, and note the error."""
    inputs, scales = work.inputs, work.scales
    quantizer = input_quantizer(work.policy, inputs, storage)
    noisy = quantizer(inputs.sample)
    args = work.policy.scheme.weights
    integers = round_to_nearest(work.weight, scales.scale, scales.bound, args).to(torch.int8)
    few = slice(None, None, max(1, len(noisy) // _REPORT_TOKENS))
    reference = inputs.sample[few] @ work.weight.t()
    error = (noisy[few] @ dequantize(integers, scales.scale, args).t()).sub_(reference).square_().sum()
    relative = float(error / reference.square_().sum().clamp(min=1e-30))
    s = work.diagonal.s if work.diagonal is not None else torch.ones_like(inputs.low)
    ends = ((inputs.low * s, inputs.high * s), (inputs.low, inputs.high))
    before, after = (extent(torch.stack(extremes(*each)).tolist()) for each in ends)
    result.groups.append(report(work.members, work.policy, work.diagonal, relative, before, after))
    start = 0
    for name in work.members:
        bias = bias_of(layer, name)
        end = start + weight_of(layer, name).shape[0]
        result.linears[name] = QuantizedLinear(
            scheme=work.policy.scheme,
            weight=integers[start:end],
            weight_scale=scales.scale[start:end],
            bias=None if bias is None else bias.detach().clone(),
            input_scale=quantizer.scale,
            input_zero_point=quantizer.zero_point,
        )
        start = end
