"""Two models' next-token distributions compared, from logits that come a slice of the vocabulary at a time.

With z the base's logits, y the other's and p = softmax(z): KL = E_p[z - y] - logsumexp(z) + logsumexp(y). All
three terms are running sums over the vocabulary, so neither whole logits nor a whole output projection are needed.
"""

from __future__ import annotations

import torch


class _Distribution:
    """One model's side, per token: the largest logit and where it is, Σ exp(z - largest), and the target's logit."""

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets
        self.largest = torch.full(targets.shape, -torch.inf)
        self.sum = torch.zeros(targets.shape, dtype=torch.float64)
        self.best = torch.zeros_like(targets)
        self.target = torch.zeros(targets.shape)

    def add(self, tokens: slice, first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns exp(logits - largest) and the factor that brings older sums onto the new largest."""
        largest, best = logits.max(dim=-1)
        old = self.largest[tokens]
        self.best[tokens] = torch.where(largest > old, best + first, self.best[tokens])
        new = torch.maximum(old, largest)
        factor = (old - new).double().exp()
        self.largest[tokens] = new
        powers = (logits - new[:, None]).exp_()
        self.sum[tokens] = self.sum[tokens] * factor + powers.sum(dim=-1).double()
        place = self.targets[tokens] - first
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[tokens] = torch.where(inside, found, self.target[tokens])
        return powers, factor

    def normalizer(self) -> torch.Tensor:
        """logsumexp of the logits, float64 [tokens]."""
        return self.largest.double() + self.sum.log()

    def surprise(self) -> torch.Tensor:
        """-log p(target), float64 [tokens]."""
        return self.normalizer() - self.target.double()


class Divergence:
    """Accumulates over slices of the vocabulary, in any order of tokens.

    Args:
        targets: int64 [tokens], the token that really follows.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self.base = _Distribution(targets)
        self.other = _Distribution(targets)
        self._gap = torch.zeros(targets.shape, dtype=torch.float64)

    def add(self, tokens: slice, first: int, base: torch.Tensor, other: torch.Tensor) -> None:
        """Logits float32 [tokens, n] of vocabulary entries first to first + n - 1; slices must come in this order."""
        self.other.add(tokens, first, other)
        powers, factor = self.base.add(tokens, first, base)
        self._gap[tokens] = self._gap[tokens] * factor + powers.mul_(base - other).sum(dim=-1).double()

    def kl(self) -> torch.Tensor:
        """KL(base || other) in nats, float64 [tokens]."""
        return self._gap / self.base.sum - self.base.normalizer() + self.other.normalizer()

    def agreement(self) -> torch.Tensor:
        """Whether both put the same token first, bool [tokens]; of tied tokens the first counts."""
        return self.base.best == self.other.best
