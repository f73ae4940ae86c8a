"""Static activations or a scale per token, for policies that leave it to what static ones would cost.

`NoiseModel` says what each would do to the output of linears that share their input, each with the smoothing that suits
it best. Its unit is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qtool.quant.group import policy_of
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group
from qtool.quant.transforms import Diagonal, transform_of
from qtool.quant.transforms.noise import NoiseModel
from qtool.quant.transforms.osl import sample_weights
from qtool.quant.weights import Weights
from qtool.recipe.policy import Policy

MOST = 1.5
"""Times the expected squared output error of a scale per token: what static activations may cost.

SmolLM2-135M has a KL divergence of 0.0050 with static attention, 0.0044 with 2 here, 0.0039 with 1.5, and 0.0038
without any static activations. In random models of eight families 2 left most of attention static, at twice the
divergence of none.
"""


@dataclass(frozen=True)
class Decided:
    """What became of the linears of a layer.

    Attributes:
        policies: per linear, none of `mode: auto`.
        found: smoothing scales that were found on the way, by the name of their group's first linear.
        costs: expected squared output error with static activations over that with a scale per token, likewise, of
            the groups where there was a choice.
    """

    policies: dict[str, Policy | None]
    found: dict[str, Diagonal]
    costs: dict[str, float]


@torch.no_grad()
def decide(
    weights: Weights,
    groups: Sequence[Group],
    policies: Mapping[str, Policy | None],
    statistics: Mapping[str, InputStatistics],
) -> Decided:
    """Choose for every group whose policy is of `mode: auto`; arguments as for `qtool.quant.layer.smooth`."""
    decided = Decided(dict(policies), {}, {})
    for group in groups:
        first, chosen = group.linears[0], policy_of(group, policies)
        undecided = [name for name in group.linears if (own := policies[name]) and own.activations.mode == "auto"]
        if chosen is None or not undecided:
            continue
        policy = policies[undecided[0]]
        assert policy is not None
        scales, errors = [], []
        for way in policy.ways:
            scale, error = _smoothed(weights, group, statistics[first], way)
            scales.append(scale)
            errors.append(error)
        cost = errors[0] / max(errors[1], 1e-30)
        taken = int(not cost <= MOST)  # what can't be compared gets a scale per token
        decided.costs[first] = cost
        decided.policies.update({name: own.ways[taken] for name in undecided if (own := policies[name])})
        scale = scales[taken]
        if chosen.activations.mode == "auto" and scale is not None:  # otherwise the group is smoothed for another one
            decided.found[first] = scale
    return decided


def _smoothed(
    weights: Weights, group: Group, statistics: InputStatistics, policy: Policy
) -> tuple[Diagonal | None, float]:
    """The smoothing scale of a group by a policy, if it gets one, and the expected error with it."""
    transform = transform_of(policy) if group.fold is not None else None
    scale = transform.fit(weights, group, statistics) if transform is not None else None
    if scale is not None and not math.isnan(scale.error):
        return scale, scale.error
    sample, maximum = sample_weights(weights, group, statistics)
    s = torch.ones_like(maximum) if scale is None else scale.s
    return scale, float(NoiseModel(statistics.smoothed(None), sample, policy.scheme).error(s.log()))
