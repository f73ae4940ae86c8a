"""OSL's exponents, step for step as mindspore-gs 1.4.1 searches them: by the whole decoder layer's output error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qtool.quant.exact.replay import Recording, Replay
from qtool.quant.integer import asymmetric_parameters
from qtool.quant.product import INT8, QuantizedWeight, Range, asymmetric_product, per_token_product
from qtool.quant.topology import Group, bias_of, weight_of
from qtool.quant.transforms.diagonal import Diagonal, smoothing_scale
from qtool.quant.transforms.osl import ALPHAS
from qtool.scheme import Scheme

CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))
CLIP_TOKENS = 512
_MARGIN = 2e-2  # between a coarse loss and the exact one; measured on SmolLM2: at most 6e-3
_LIKELY_ALPHA = 0.8  # tried first: the better the first candidates, the sooner the others are dropped


def search(
    recordings: Sequence[Recording], group: Group, act_max: torch.Tensor, w_max: torch.Tensor, scheme: Scheme
) -> Diagonal:
    """The alpha with the least mean squared error of the layer's output, averaged over samples; the smallest of a tie.

    Only this group is quantized while the rest of the layer stays float. All candidates are tried with coarse
    products in what follows the group, those that come out alike once more with exact ones; a candidate is dropped
    as soon as its error on the samples so far is more than that of the best on all.

    Args:
        recordings: one per calibration sample, of the untouched float32 layer.
        group: whose smoothing is searched.
        act_max, w_max: float32 [in], already pooled per producer channel.
        scheme: activations static are per tensor (range of each sample by itself), else per token.
    """
    trial = _Trial(recordings, group, act_max, w_max, scheme)
    losses = trial.losses(ALPHAS, coarse=True)
    least = min(losses.values())
    close = [alpha for alpha, loss in losses.items() if loss <= least * (1 + _MARGIN)]
    if len(close) > 1:
        losses = trial.losses(close, coarse=False)
    best = min(losses, key=lambda alpha: (losses[alpha], alpha))
    return Diagonal(smoothing_scale(act_max, w_max, best), best, losses[best])


class _Trial:
    """What all candidates for one group share."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        group: Group,
        act_max: torch.Tensor,
        w_max: torch.Tensor,
        scheme: Scheme,
    ) -> None:
        layer = recordings[0].layer
        weights = [weight_of(layer, name) for name in group.linears]
        self._linears, self._widths, self._weight = group.linears, [len(w) for w in weights], torch.cat(weights)
        self._biases = [bias_of(layer, name) for name in group.linears]
        self._act_max, self._w_max, self._scheme = act_max, w_max, scheme
        self._replays = [Replay(recording, group.linears) for recording in recordings]
        self._energy = max(sum(float(replay.output.square().mean()) for replay in self._replays), 1e-30)
        later = {name: weight_of(layer, name).clone() for name in self._replays[0].later}
        self._coarse = {name: QuantizedWeight.of(weight, INT8) for name, weight in later.items()}

    def losses(self, alphas: Sequence[float], *, coarse: bool) -> dict[float, float]:
        """Relative squared error of the layer's output per alpha; those that can't win are left out."""
        found: dict[float, float] = {}
        limit = float("inf")
        for alpha in sorted(alphas, key=lambda alpha: abs(alpha - _LIKELY_ALPHA)):
            s = smoothing_scale(self._act_max, self._w_max, alpha)
            weight = QuantizedWeight.of(self._weight * s, self._scheme.weights)
            loss = 0.0
            for replay in self._replays:
                output = replay(self._results(replay.x, s, weight), self._coarse if coarse else None)
                loss += float((output - replay.output).square_().mean()) / self._energy
                if loss > limit:
                    break
            else:
                found[alpha] = loss
                limit = min(limit, loss * (1 + _MARGIN))
        return found

    def _results(self, x: torch.Tensor, s: torch.Tensor, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """What the group's linears give when x / s and W · s are quantized."""
        x = x.reshape(-1, x.shape[-1]) / s
        args = self._scheme.activations
        assert args is not None
        if args.symmetric:
            product = per_token_product(x, weight, args)
        else:
            low, high = x.aminmax() if self._scheme.is_static else x.aminmax(dim=1, keepdim=True)
            product = asymmetric_product(x, Range(*asymmetric_parameters(low, high, args)), weight, args)
        parts = product.split(self._widths, dim=1)
        return {
            name: part if bias is None else part + bias
            for name, part, bias in zip(self._linears, parts, self._biases, strict=True)
        }
