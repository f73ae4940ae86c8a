"""OSL, step for step as mindspore-gs 1.4.1 searches it: the loss is the whole decoder layer's output error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from qtool.quant.replay import Recording
from qtool.quant.smoothing import ALPHAS, QuantizedProduct, Smoothing, quantized_weight, scale
from qtool.quant.topology import Group, bias_of, weight_of

CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))
CLIP_TOKENS = 512
_LIKELY_ALPHA = 0.8  # tried first: the better the first candidates, the sooner the others are dropped


def search(
    layer: nn.Module,
    group: Group,
    runs: Sequence[Callable[[], torch.Tensor]],
    act_max: torch.Tensor,
    w_max: torch.Tensor,
    *,
    static: bool,
) -> Smoothing:
    """The alpha with the least mean squared error of the layer's output, averaged over samples; the smallest of a tie.

    Only this group is quantized while the rest of the layer stays float. What runs before the group is recorded
    once per sample; a candidate is dropped as soon as its error on the samples
    so far is more than that of the best on all.

    Args:
        layer: float32 decoder layer, untouched.
        group: whose smoothing is searched.
        runs: one per calibration sample; calls the layer on it and returns its output.
        act_max, w_max: float32 [in], already pooled per producer channel.
        static: activations per tensor (range of each sample by itself), else per token.
    """
    weights = [weight_of(layer, name) for name in group.linears]
    biases = [bias_of(layer, name) for name in group.linears]
    widths, weight = [len(w) for w in weights], torch.cat(weights)
    recordings = [Recording(layer, run, group.linears) for run in runs]
    products = [QuantizedProduct(record.x.reshape(-1, record.x.shape[-1]), static=static) for record in recordings]
    energy = max(sum(float(record.output.square().mean()) for record in recordings), 1e-30)
    best: Smoothing | None = None
    for alpha in sorted(ALPHAS, key=lambda alpha: abs(alpha - _LIKELY_ALPHA)):
        s = scale(act_max, w_max, alpha)
        quantized = quantized_weight(weight, s)
        loss = 0.0
        for record, product in zip(recordings, products, strict=True):
            parts = product(s, *quantized).split(widths, dim=1)
            results = {
                name: part if bias is None else part + bias
                for name, part, bias in zip(group.linears, parts, biases, strict=True)
            }
            loss += float((record.replay(results) - record.output).square_().mean()) / energy
            if best is not None and loss > best.error:
                break
        if best is None or (loss, alpha) < (best.error, best.alpha):
            best = Smoothing(s, alpha, loss)
    assert best is not None
    return best
