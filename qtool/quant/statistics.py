"""What calibration keeps of the tensor that enters a group of linears."""

from __future__ import annotations

from typing import Any

import torch

from qtool.quant.importance import Importance

_HESSIAN_STRIDE = 2  # every other token gives the same rounding; the product costs as much as the layer itself


class InputStatistics:
    """Streaming statistics of an input [tokens, in], never the whole of it; on the device that the input is on.

    Pickled, they are in main memory: who unpickles them may have another device.

    Attributes:
        low, high: float32 [in], per-channel minimum and maximum over all tokens.
        hessian: float32 [in, in], of a row's squared output error, up to a factor: the mean of xᵀx over every
            `hessian_stride`-th token, when asked for.
        sample: [kept tokens, in], every `stride`-th token of each sample, in the input's dtype.

    Args:
        stride: keep every stride-th token; its phase moves from sample to sample, so that all positions count
            alike: the first token of a sample is often an outlier that must be neither lost nor over-weighted.
        with_hessian: also accumulate the Hessian.
        hessian_stride: over every so many tokens.
        importance: of the tokens that will come, in their order, and of the rows of the linears; it weighs the Hessian
            and the energy. None counts all alike.
    """

    def __init__(
        self,
        *,
        stride: int,
        with_hessian: bool,
        hessian_stride: int = _HESSIAN_STRIDE,
        importance: Importance | None = None,
    ) -> None:
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        self._hessian: torch.Tensor | None = None
        self._stride = stride
        self._with_hessian = with_hessian
        self._hessian_stride = hessian_stride
        self._tokens = 0
        self._hessian_tokens: float = 0
        self._seen = 0
        self._kept: list[torch.Tensor] = []
        self._token_weights = None if importance is None else importance.tokens
        self._row_weights = None if importance is None else importance.rows
        self._kept_weights: list[torch.Tensor] = []
        self._squared_weights = 0.0

    @classmethod
    def empty(cls, width: int) -> InputStatistics:
        """Of an input of this width that no token has shown."""
        observed = cls(stride=1, with_hessian=False)
        observed._low = observed._high = observed._squares = torch.zeros(width)
        observed._kept.append(torch.empty(0, width))
        return observed

    def update(self, x: torch.Tensor) -> None:
        """Add a batch of samples [batch, length, in], or of tokens [tokens, in]."""
        samples = x.reshape(-1, x.shape[-2], x.shape[-1])
        x = samples.reshape(-1, x.shape[-1])
        low, high = x.amin(dim=0).float(), x.amax(dim=0).float()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if self._with_hessian:
            # The product runs in the input's dtype (bfloat16 doubles the speed), the sum over batches in float32.
            every = slice(self._seen % self._hessian_stride, None, self._hessian_stride)
            some = self._weighted(x[every], every, len(x))
            product = some.t() @ some
            self._hessian = product.float() if self._hessian is None else self._hessian.add_(product)
        else:
            weighted = self._weighted(x, slice(None), len(x))
            squares = torch.linalg.vector_norm(weighted, dim=0, dtype=torch.float32).square_()
            self._squares = squares if self._squares is None else self._squares.add_(squares)
        for number, sample in enumerate(samples):
            every = slice(self._seen % self._stride, None, self._stride)
            self._kept.append(sample[every].clone())
            if self._token_weights is not None:
                first = self._tokens + number * len(sample)
                self._kept_weights.append(self._token_weights[first : first + len(sample)][every])
            self._seen += 1
        self._tokens += x.shape[0]

    def _weighted(self, some: torch.Tensor, every: slice, count: int) -> torch.Tensor:
        """Some of the next `count` tokens, times the root of their weights; the weights are counted."""
        if self._token_weights is None:
            self._hessian_tokens += len(some)
            return some
        weights = self._token_weights[self._tokens : self._tokens + count][every]
        self._hessian_tokens += float(weights.sum())
        self._squared_weights += float(weights.square().sum())
        return (some.float() * weights.sqrt()[:, None].to(some.device)).to(some.dtype)

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same on another device; tensors that are there already are shared."""
        moved = object.__new__(InputStatistics)
        moved.__dict__ = {
            name: value if name.endswith("_weights") else _moved(value, device) for name, value in vars(self).items()
        }
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return vars(self.to("cpu"))

    @property
    def device(self) -> torch.device:
        return self.low.device

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def low(self) -> torch.Tensor:
        return _seen(self._low)

    @property
    def high(self) -> torch.Tensor:
        return _seen(self._high)

    @property
    def amax(self) -> torch.Tensor:
        """Per-channel max|x|, float32 [in]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def energy(self) -> torch.Tensor:
        """Per-channel mean square, float32 [in]."""
        if self._with_hessian:
            return _seen(self._hessian).diagonal() / self._hessian_tokens
        return _seen(self._squares) / self._hessian_tokens

    @property
    def hessian(self) -> torch.Tensor:
        return _seen(self._hessian) / self._hessian_tokens

    @property
    def hessian_tokens(self) -> int:
        """How many tokens the Hessian is the mean over; as many of equal weight would be as sure (Kish's number)."""
        if self._token_weights is None:
            return round(self._hessian_tokens)
        return max(1, round(self._hessian_tokens**2 / max(self._squared_weights, 1e-30)))

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self._kept)

    @property
    def importance(self) -> Importance | None:
        """Of the sample's tokens, and of the rows of the linears; None where all count alike."""
        if self._token_weights is None or self._row_weights is None:
            return None
        return Importance(torch.cat(self._kept_weights).to(self.device), self._row_weights.to(self.device))

    def smoothed(self, s: torch.Tensor | None) -> Smoothed:
        """Of x / s, with s [in]; None for x itself."""
        return Smoothed(self, s)


class Smoothed:
    """What is known of an input x once it is divided by s.

    Attributes:
        sample: float32 [kept tokens, in].
        low, high: float32 [in].
        importance: of the sample's tokens, and of the rows of the linears; None where all count alike.
    """

    def __init__(self, statistics: InputStatistics, s: torch.Tensor | None) -> None:
        self._statistics, self._s = statistics, s
        self.sample, self.low, self.high = statistics.sample.float(), statistics.low, statistics.high
        self.importance = statistics.importance
        if s is not None:
            self.sample, self.low, self.high = self.sample / s, self.low / s, self.high / s

    @property
    def energy(self) -> torch.Tensor:
        """Per-channel mean square, float32 [in]."""
        energy = self._statistics.energy
        return energy if self._s is None else energy / self._s.square()

    @property
    def hessian(self) -> torch.Tensor:
        """float32 [in, in], a new tensor."""
        hessian = self._statistics.hessian
        return hessian if self._s is None else hessian / self._s / self._s[:, None]

    @property
    def hessian_tokens(self) -> int:
        """How many tokens the Hessian is the mean over."""
        return self._statistics.hessian_tokens


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [each.to(device) for each in value] if isinstance(value, list) else value


def _seen(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("no batch has been observed, or the Hessian was not asked for")
    return value
