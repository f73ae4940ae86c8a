"""SmoothQuant: Xiao et al. (arXiv 2211.10438)."""

from __future__ import annotations

from typing import ClassVar

import torch

from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, per_producer_channel
from qtool.quant.transforms.diagonal import Diagonal, smoothing_scale
from qtool.quant.weights import Weights, chunks
from qtool.recipe.policy import Policy

_CHUNK = 1 << 22  # weights that are in float32 at a time: what the cache takes


class SmoothQuant:
    """The same exponent for every group."""

    needs_hessian: ClassVar[bool] = False

    def __init__(self, policy: Policy) -> None:
        assert policy.smoothing.method == "smoothquant"
        self._alpha = policy.smoothing.alpha

    def fit(self, weights: Weights, group: Group, statistics: InputStatistics) -> Diagonal:
        assert group.fold is not None
        w_max = torch.zeros(weights.shape(group.linears[0])[1], device=statistics.device)
        for chunk in chunks(weights, group.linears, _CHUNK):
            for rows in chunk:
                w_max = torch.maximum(w_max, weights.rows(*rows).abs().amax(dim=0))
        act_max, w_max = (per_producer_channel(group.fold, each) for each in (statistics.amax, w_max))
        return Diagonal(smoothing_scale(act_max, w_max, self._alpha), self._alpha)
