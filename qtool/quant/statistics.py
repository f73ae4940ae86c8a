"""What calibration keeps of the tensor that enters a group of linears."""

from __future__ import annotations

import torch


class InputStatistics:
    """Streaming statistics of an input [tokens, in], never the whole of it.

    Attributes:
        low, high: float32 [in], per-channel minimum and maximum over all tokens.
        gram: float32 [in, in], the mean of xᵀx over all tokens, when asked for.
        sample: [kept tokens, in], every `stride`-th token of each batch, in the input's dtype.

    Args:
        stride: keep every stride-th token; its phase moves from batch to batch, so that all positions count
            alike: the first token of a sample is often an outlier that must be neither lost nor over-weighted.
        with_gram: also accumulate the Gram matrix.
    """

    def __init__(self, *, stride: int, with_gram: bool) -> None:
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        self._gram: torch.Tensor | None = None
        self._stride = stride
        self._with_gram = with_gram
        self._tokens = 0
        self._batches = 0
        self._kept: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        """Add a batch [..., in]."""
        x = x.reshape(-1, x.shape[-1])
        low, high = x.aminmax(dim=0)
        low, high = low.float(), high.float()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        squares = x.float().square().sum(dim=0)
        self._squares = squares if self._squares is None else self._squares + squares
        if self._with_gram:
            # The product runs in the input's dtype (bfloat16 doubles the speed), the sum over batches in float32.
            product = x.t() @ x
            if self._gram is None:
                self._gram = product.float()
            else:
                self._gram.add_(product)
        self._kept.append(x[self._batches % self._stride :: self._stride].clone())
        self._tokens += x.shape[0]
        self._batches += 1

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
        return _seen(self._squares) / self._tokens

    @property
    def gram(self) -> torch.Tensor:
        return _seen(self._gram) / self._tokens

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self._kept)


def _seen(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("no batch has been observed, or the Gram matrix was not asked for")
    return value
