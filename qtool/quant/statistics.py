"""What calibration keeps of the tensor that enters a group of linears."""

from __future__ import annotations

import torch

_GRAM_STRIDE = 2  # every other token gives the same rounding; the product costs as much as the layer itself


class InputStatistics:
    """Streaming statistics of an input [tokens, in], never the whole of it; kept in main memory wherever the input is.

    Attributes:
        low, high: float32 [in], per-channel minimum and maximum over all tokens.
        gram: float32 [in, in], the mean of xᵀx over every `gram_stride`-th token, when asked for.
        sample: [kept tokens, in], every `stride`-th token of each sample, in the input's dtype.

    Args:
        stride: keep every stride-th token; its phase moves from sample to sample, so that all positions count
            alike: the first token of a sample is often an outlier that must be neither lost nor over-weighted.
        with_gram: also accumulate the Gram matrix.
        gram_stride: over every so many tokens.
    """

    def __init__(self, *, stride: int, with_gram: bool, gram_stride: int = _GRAM_STRIDE) -> None:
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        self._gram: torch.Tensor | None = None
        self._stride = stride
        self._with_gram = with_gram
        self._gram_stride = gram_stride
        self._tokens = 0
        self._gram_tokens = 0
        self._seen = 0
        self._kept: list[torch.Tensor] = []

    @classmethod
    def empty(cls, width: int) -> InputStatistics:
        """Of an input of this width that no token has shown."""
        observed = cls(stride=1, with_gram=False)
        observed._low = observed._high = observed._squares = torch.zeros(width)
        observed._kept.append(torch.empty(0, width))
        return observed

    def update(self, x: torch.Tensor) -> None:
        """Add a batch of samples [batch, length, in], or of tokens [tokens, in]."""
        samples = x.reshape(-1, x.shape[-2], x.shape[-1])
        x = samples.reshape(-1, x.shape[-1])
        low, high = x.amin(dim=0).float().cpu(), x.amax(dim=0).float().cpu()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if self._with_gram:
            # The product runs in the input's dtype (bfloat16 doubles the speed), the sum over batches in float32.
            some = x[self._seen % self._gram_stride :: self._gram_stride]
            product = (some.t() @ some).cpu()
            self._gram = product.float() if self._gram is None else self._gram.add_(product)
            self._gram_tokens += some.shape[0]
        else:
            squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_().cpu()
            self._squares = squares if self._squares is None else self._squares.add_(squares)
        for sample in samples:
            self._kept.append(sample[self._seen % self._stride :: self._stride].to("cpu", copy=True))
            self._seen += 1
        self._tokens += x.shape[0]

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
        return self.gram.diagonal() if self._with_gram else _seen(self._squares) / self._tokens

    @property
    def gram(self) -> torch.Tensor:
        return _seen(self._gram) / self._gram_tokens

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self._kept)


def _seen(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("no batch has been observed, or the Gram matrix was not asked for")
    return value
