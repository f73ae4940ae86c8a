"""Per-channel smoothing of a group's input: x / s with W · s computes the same, and rounds better.

SmoothQuant is Xiao et al. (arXiv 2211.10438); OSL (OutlierSuppressionLite) is mindspore-gs 1.4.1's search
for one exponent alpha per group. `fit` goes on from its best alpha to a scale of each channel's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.quant import threads

ALPHAS = tuple(i / 20 for i in range(20))
_FLOOR = 1e-5
_STEPS, _RATE, _REFRESH, _CANDIDATES = 40, 0.05, 20, 16


@dataclass(frozen=True)
class Smoothing:
    """A smoothing scale and how it was found.

    Attributes:
        s: float32 [in].
        alpha: the exponent behind it.
        error: the loss that it minimises; comparable within one search only.
    """

    s: torch.Tensor
    alpha: float
    error: float = float("nan")


def scale(act_max: torch.Tensor, w_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = act_max^alpha / w_max^(1-alpha), at least 1e-5; 1 where either maximum is 0. All float32 [in]."""
    s = (act_max.pow(alpha) / w_max.pow(1 - alpha)).clamp_(min=_FLOOR)
    s[(act_max == 0) | (w_max == 0)] = 1
    return s


class NoiseModel:
    """The expected squared output error of a quantized group as a smooth function of its smoothing scale.

    Rounding to steps of size d adds noise of variance d²/12 to every element, independent of the rest. So
    error(s) = mean over tokens of step² · |W s|² + compensation · (sum over rows of step²) · E|x/s|², all / 12,
    with steps from the row maxima of x/s and W·s. It needs no matrix product, and each channel's s is free.

    Args:
        x: float32 [tokens, in], the sample.
        weight: float32 [out, in].
        low, high: per-channel extremes over all of calibration, float32 [in].
        energy: per-channel mean square over all of calibration, float32 [in].
        static: activations per tensor instead of per token.
        compensation: what rounding leaves of the weights' noise: 1 to nearest, less with error compensation. More
            where `weight` is only some of the rows.
        weight_energy: sum over all rows of W², float32 [in]; that of `weight` when not given.
    """

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        energy: torch.Tensor,
        *,
        static: bool,
        compensation: float,
        weight_energy: torch.Tensor | None = None,
    ) -> None:
        # A static range is that of one token whose channels are at their extremes, both ways.
        self._tokens = torch.stack((low.clamp(max=0), high.clamp(min=0))).abs() if static else x.abs()
        self._rows = weight.abs()
        self._static = static
        self._energy = energy
        self._weight_energy = weight.square().sum(dim=0) if weight_energy is None else weight_energy
        self._compensation = compensation
        self._near: tuple[_Peaks, _Peaks] | None = None

    def error(self, log_s: torch.Tensor) -> float:
        """The model's error, up to a constant factor."""
        token_peaks, row_peaks = (self._tokens * (-log_s).exp()).amax(dim=1), (self._rows * log_s.exp()).amax(dim=1)
        return self._combine(token_peaks, row_peaks, log_s)[0]

    def focus(self, log_s: torch.Tensor) -> None:
        """Restrict `gradient` to the largest channels of each token and row around `log_s`."""
        self._near = _Peaks(self._tokens, -log_s), _Peaks(self._rows, log_s)

    def gradient(self, log_s: torch.Tensor) -> torch.Tensor:
        """Gradient of log(error) by log_s [in]."""
        assert self._near is not None
        tokens, rows = self._near
        token_peaks, row_peaks = tokens.values(-log_s), rows.values(log_s)
        total, spread, reach, step, slack = self._combine(token_peaks, row_peaks, log_s)
        channels = torch.zeros_like(log_s)
        rows.scatter(channels, row_peaks.square() * (2 * self._compensation * reach))
        if self._static:
            low, high = token_peaks
            tokens.scatter(channels, torch.stack((low, high)) * (-0.5 * (low + high) * spread))
        else:
            tokens.scatter(channels, token_peaks.square() * (-2 * spread / len(token_peaks)))
        channels += 2 * step * self._weight_energy * (2 * log_s).exp()
        channels -= 2 * slack * self._energy * (-2 * log_s).exp()
        return channels / total

    def _combine(
        self, token_peaks: torch.Tensor, row_peaks: torch.Tensor, log_s: torch.Tensor
    ) -> tuple[float, float, float, float, float]:
        """(error, |W s|², E|x/s|², activation step², compensation · weight step²), steps up to the same factor."""
        # Steps are in units of those of a symmetric range, 2 max / 255; a static range is max - min.
        step = float(token_peaks.sum().square() / 4) if self._static else float(token_peaks.square().mean())
        spread = float((self._weight_energy * (2 * log_s).exp()).sum())
        reach = float((self._energy * (-2 * log_s).exp()).sum())
        slack = self._compensation * float(row_peaks.square().sum())
        return step * spread + slack * reach, spread, reach, step, slack


class _Peaks:
    """Row maxima of |a| · exp(t), from each row's largest few channels."""

    def __init__(self, magnitudes: torch.Tensor, t: torch.Tensor) -> None:
        candidates = min(_CANDIDATES, magnitudes.shape[1])
        self._channels = (magnitudes * t.exp()).topk(candidates, dim=1, sorted=False).indices
        self._magnitudes = magnitudes.gather(1, self._channels)
        self._at = self._channels[:, :1]

    def values(self, t: torch.Tensor) -> torch.Tensor:
        """The maxima [rows]; remembers where they are."""
        peaks, position = (self._magnitudes * t.exp()[self._channels]).max(dim=1, keepdim=True)
        self._at = self._channels.gather(1, position)
        return peaks[:, 0]

    def scatter(self, channels: torch.Tensor, amounts: torch.Tensor) -> None:
        """Add each row's amount to the channel of its maximum."""
        channels.index_add_(0, self._at[:, 0], amounts)


def fit(model: NoiseModel, act_max: torch.Tensor, w_max: torch.Tensor, channel_map: torch.Tensor) -> Smoothing:
    """The smoothing scale with the least error under the noise model: OSL's best alpha, then every channel by itself.

    Args:
        model: of the group.
        act_max, w_max: float32 [in], as for `scale`.
        channel_map: int64 [in]; channels that fold into the same producer channel share one s.
    """
    least, alpha, log_s = min(
        ((model.error(t := scale(act_max, w_max, alpha).log()), alpha, t) for alpha in ALPHAS[::2]),
        key=lambda found: found[0],
    )
    unique, inverse = channel_map.unique(return_inverse=True)
    shared = torch.zeros(len(unique), device=log_s.device)
    shared[inverse] = log_s
    optimizer = torch.optim.Adam([shared], lr=_RATE)
    for step in range(_STEPS):
        if step % _REFRESH == 0:
            model.focus(shared[inverse])
        with threads.single():
            shared.grad = torch.zeros_like(shared).index_add_(0, inverse, model.gradient(shared[inverse]))
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            optimizer.step()
    refined = shared[inverse]
    error = model.error(refined)
    return Smoothing(refined.exp(), alpha, error) if error < least else Smoothing(log_s.exp(), alpha, least)
