"""OSL (OutlierSuppressionLite), as qtool searches it: the best exponent per group, then a scale of each channel's own.

The exponent's search is that of mindspore-gs 1.4.1 with another loss, a noise model instead of the whole layer's output
(`qtool.quant.exact` has theirs).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from qtool.quant import threads
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, per_producer_channel
from qtool.quant.transforms.diagonal import Diagonal, smoothing_scale
from qtool.quant.transforms.noise import NoiseModel, WeightSample, add_at
from qtool.quant.weights import Weights, chunks
from qtool.recipe.policy import Policy

ALPHAS = tuple(i / 20 for i in range(20))
_CHUNK = 1 << 22  # weights that are in float32 at a time: what the cache takes
_MODEL_ROWS = 1 << 24  # elements of the rows that the noise model looks at
_STEPS, _RATE, _REFRESH = 40, 0.05, 20


class OSL:
    needs_hessian: ClassVar[bool] = False

    def __init__(self, policy: Policy) -> None:
        self._scheme = policy.scheme

    def fit(self, weights: Weights, group: Group, statistics: InputStatistics) -> Diagonal:
        assert group.fold is not None
        sample, maximum = sample_weights(weights, group, statistics.device)
        act_max, w_max = (per_producer_channel(group.fold, each) for each in (statistics.amax, maximum))
        model = NoiseModel(statistics.smoothed(None), sample, self._scheme)
        return fit(model, act_max, w_max, group.fold.channel_map)


def sample_weights(weights: Weights, group: Group, device: torch.device) -> tuple[WeightSample, torch.Tensor]:
    """Some rows of the group's weights with what is known of all; and max|W| per input channel, float32 [in]."""
    width = weights.shape(group.linears[0])[1]
    stride = max(1, sum(weights.shape(name)[0] * width for name in group.linears) // _MODEL_ROWS)
    maximum, energy = torch.zeros(width, device=device), torch.zeros(width, device=device)
    some = []
    for chunk in chunks(weights, group.linears, _CHUNK):
        for place in chunk:
            rows = weights.rows(*place)
            some.append(rows[::stride].clone() if stride > 1 else rows)
            maximum = torch.maximum(maximum, rows.abs().amax(dim=0))
            energy += rows.square().sum(dim=0)
    return WeightSample(torch.cat(some), energy, stride), maximum


def fit(model: NoiseModel, act_max: torch.Tensor, w_max: torch.Tensor, channel_map: torch.Tensor) -> Diagonal:
    """The scale with the least error under the noise model: the best alpha, then every channel by itself.

    Args:
        model: of the group.
        act_max, w_max: float32 [in], as for `smoothing_scale`.
        channel_map: int64 [in]; channels that fold into the same producer channel share one s.
    """
    least, alpha, log_s = min(
        ((model.error(t := smoothing_scale(act_max, w_max, alpha).log()), alpha, t) for alpha in ALPHAS[::2]),
        key=lambda found: found[0],
    )
    unique, inverse = channel_map.to(log_s.device).unique(return_inverse=True)
    shared = torch.zeros(len(unique), device=log_s.device)
    shared[inverse] = log_s
    optimizer = torch.optim.Adam([shared], lr=_RATE)
    for step in range(_STEPS):
        if step % _REFRESH == 0:
            model.focus(shared[inverse])
        with threads.single():
            shared.grad = add_at(torch.zeros_like(shared), inverse, model.gradient(shared[inverse]))
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            optimizer.step()
    refined = shared[inverse]
    error = model.error(refined)
    return Diagonal(refined.exp(), alpha, error) if error < least else Diagonal(log_s.exp(), alpha, least)
