"""What calibration keeps of the tensor that enters a group of linears."""

from __future__ import annotations

from typing import Any

import torch

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
    """

    def __init__(self, *, stride: int, with_hessian: bool, hessian_stride: int = _HESSIAN_STRIDE) -> None:
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        self._hessian: torch.Tensor | None = None
        self._stride = stride
        self._with_hessian = with_hessian
        self._hessian_stride = hessian_stride
        self._tokens = 0
        self._hessian_tokens = 0
        self._seen = 0
        self._kept: list[torch.Tensor] = []

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
            some = x[self._seen % self._hessian_stride :: self._hessian_stride]
            product = some.t() @ some
            self._hessian = product.float() if self._hessian is None else self._hessian.add_(product)
            self._hessian_tokens += some.shape[0]
        else:
            squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
            self._squares = squares if self._squares is None else self._squares.add_(squares)
        for sample in samples:
            self._kept.append(sample[self._seen % self._stride :: self._stride].clone())
            self._seen += 1
        self._tokens += x.shape[0]

    def to(self, device: torch.device | str) -> InputStatistics:
        """The same on another device; tensors that are there already are shared."""
        moved = object.__new__(InputStatistics)
        moved.__dict__ = {name: _moved(value, device) for name, value in vars(self).items()}
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
        return _seen(self._squares) / self._tokens

    @property
    def hessian(self) -> torch.Tensor:
        return _seen(self._hessian) / self._hessian_tokens

    @property
    def hessian_tokens(self) -> int:
        """How many tokens the Hessian is the mean over."""
        return self._hessian_tokens

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self._kept)

    def smoothed(self, s: torch.Tensor | None) -> Smoothed:
        """Of x / s, with s [in]; None for x itself."""
        return Smoothed(self, s)


class Smoothed:
    """What is known of an input x once it is divided by s.

    Attributes:
        sample: float32 [kept tokens, in].
        low, high: float32 [in].
    """

    def __init__(self, statistics: InputStatistics, s: torch.Tensor | None) -> None:
        self._statistics, self._s = statistics, s
        self.sample, self.low, self.high = statistics.sample.float(), statistics.low, statistics.high
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
