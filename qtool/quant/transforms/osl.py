"""OSL (OutlierSuppressionLite), as qtool searches it: the best exponent per group, then a scale of each channel's own.

The exponent's search is that of mindspore-gs 1.4.1 with another loss, a noise model instead of the whole layer's output
(`qtool.quant.exact` has theirs).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from qtool.quant import threads
from qtool.quant.rounding import graphs
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
_MEAN, _SQUARE, _EPSILON = 0.9, 0.999, 1e-8  # Adam's, as torch.optim.Adam has them


class OSL:
    needs_hessian: ClassVar[bool] = False

    def __init__(self, policy: Policy) -> None:
        self._scheme = policy.scheme

    def fit(self, weights: Weights, group: Group, statistics: InputStatistics) -> Diagonal:
        assert group.fold is not None
        sample, maximum = sample_weights(weights, group, statistics)
        act_max, w_max = (per_producer_channel(group.fold, each) for each in (statistics.amax, maximum))
        model = NoiseModel(statistics.smoothed(None), sample, self._scheme)
        return fit(model, act_max, w_max, group.fold.channel_map)


def sample_weights(weights: Weights, group: Group, statistics: InputStatistics) -> tuple[WeightSample, torch.Tensor]:
    """Some rows of the group's weights with what is known of all; and max|W| per input channel, float32 [in]."""
    device = statistics.device
    found = statistics.importance
    importance = None if found is None else found.rows
    width = weights.shape(group.linears[0])[1]
    stride = max(1, sum(weights.shape(name)[0] * width for name in group.linears) // _MODEL_ROWS)
    maximum, energy = torch.zeros(width, device=device), torch.zeros(width, device=device)
    some: list[torch.Tensor] = []
    matter: list[torch.Tensor] = []
    first = 0
    for chunk in chunks(weights, group.linears, _CHUNK):
        for place in chunk:
            rows = weights.rows(*place)
            some.append(rows[::stride].clone() if stride > 1 else rows)
            maximum = torch.maximum(maximum, rows.abs().amax(dim=0))
            if importance is None:
                energy += rows.square().sum(dim=0)
                continue
            own = importance[first : first + len(rows)]
            first += len(rows)
            energy += own @ rows.square()
            matter.append(own[::stride])
    return WeightSample(torch.cat(some), energy, stride, torch.cat(matter) if matter else None), maximum


def fit(model: NoiseModel, act_max: torch.Tensor, w_max: torch.Tensor, channel_map: torch.Tensor) -> Diagonal:
    """The scale with the least error under the noise model: the best alpha, then every channel by itself.

    Args:
        model: of the group.
        act_max, w_max: float32 [in], as for `smoothing_scale`.
        channel_map: int64 [in]; channels that fold into the same producer channel share one s.
    """
    alphas = ALPHAS[::2]
    starts = torch.stack([smoothing_scale(act_max, w_max, alpha).log() for alpha in alphas])
    errors = torch.stack([model.error(log_s) for log_s in starts])
    log_s = starts.index_select(0, errors.argmin()[None])[0]
    refined = _descended(model, log_s, channel_map)
    *tried, error = torch.cat((errors, model.error(refined)[None])).tolist()  # the device is waited for here only
    least = min(tried)
    alpha = alphas[tried.index(least)]
    return Diagonal(refined.exp(), alpha, error) if error < least else Diagonal(log_s.exp(), alpha, least)


def _descended(model: NoiseModel, log_s: torch.Tensor, channel_map: torch.Tensor) -> torch.Tensor:
    """From log_s [in] down the model's gradient with Adam (Kingma and Ba, arXiv 1412.6980)."""
    unique, inverse = channel_map.cpu().unique(return_inverse=True)
    inverse = inverse.to(log_s.device)
    shared = torch.zeros(len(unique), device=log_s.device)
    shared[inverse] = log_s
    start, mean, square = shared.clone(), torch.zeros_like(shared), torch.zeros_like(shared)

    def step(size: torch.Tensor, correction: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slope = add_at(torch.zeros_like(shared), inverse, model.gradient(shared[inverse]))
        mean.lerp_(slope, 1 - _MEAN)
        square.mul_(_SQUARE).addcmul_(slope, slope, value=1 - _SQUARE)
        return (shared.add_(size * mean / (square.sqrt() / correction).add_(_EPSILON)),)

    factors = [
        (-_RATE * (1 - i / _STEPS) / (1 - _MEAN ** (i + 1)), (1 - _SQUARE ** (i + 1)) ** 0.5) for i in range(_STEPS)
    ]
    sizes, corrections = torch.tensor(factors, device=log_s.device).unbind(1)
    model.focus(log_s)
    run: graphs.Function = step
    if graphs.usable(log_s.device):
        run = graphs.recorded(step, (sizes[0], corrections[0]))
        for tensor, value in ((shared, start), (mean, 0), (square, 0)):  # it has tried one step
            tensor.copy_(value) if isinstance(value, torch.Tensor) else tensor.fill_(value)
    for i in range(_STEPS):
        if i and i % _REFRESH == 0:
            model.focus(shared[inverse])
        with threads.single():
            run(sizes[i], corrections[i])
    return shared[inverse]
