"""Two models' next-token distributions compared, from logits that come a slice of the vocabulary at a time.

With z the base's logits, y the other's and p = softmax(z): KL = E_p[z - y] - logsumexp(z) + logsumexp(y). All
three terms are running sums over the vocabulary, so neither whole logits nor a whole output projection are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

TOP = 5


class _Distribution:
    """One model's side, per token: the TOP largest logits and where they are, Σ exp(z - largest), the target's logit.

    The first of `best` is the first entry of a tie; among the others a tie may fall either way.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets
        self.top = torch.full((*targets.shape, TOP), -torch.inf)
        self.sum = torch.zeros(targets.shape, dtype=torch.float64)
        self.best = torch.full((*targets.shape, TOP), -1)
        self.target = torch.zeros(targets.shape)

    def add(self, tokens: slice, first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns exp(logits - largest) and the factor that brings older sums onto the new largest."""
        old = self.top[tokens, 0].clone()
        self._keep_best(tokens, first, logits)
        new = self.top[tokens, 0]
        factor = (old - new).double().exp()
        powers = (logits - new[:, None]).exp_()
        self.sum[tokens] = self.sum[tokens] * factor + powers.sum(dim=-1).double()
        place = self.targets[tokens] - first
        inside = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[tokens] = torch.where(inside, found, self.target[tokens])
        return powers, factor

    def _keep_best(self, tokens: slice, first: int, logits: torch.Tensor) -> None:
        largest, best = logits.max(dim=-1)  # of tied logits topk may name any
        found, places = logits.topk(min(TOP, logits.shape[1]), dim=-1)
        values = torch.cat((self.top[tokens], found), dim=1)
        names = torch.cat((self.best[tokens], places + first), dim=1)
        new = largest > values[:, 0]
        values, order = values.sort(dim=1, descending=True, stable=True)
        names = names.gather(1, order)
        self.top[tokens] = values[:, :TOP]
        # ...so where this slice has the largest, its first one is put in front, in the place of the one topk named
        swapped = torch.where(names == best[:, None] + first, names[:, :1], names)
        swapped[:, 0] = best + first
        self.best[tokens] = torch.where(new[:, None], swapped, names)[:, :TOP]

    def normalizer(self) -> torch.Tensor:
        """logsumexp of the logits, float64 [tokens]."""
        return self.top[:, 0].double() + self.sum.log()

    def surprise(self) -> torch.Tensor:
        """-log p(target), float64 [tokens]."""
        return self.normalizer() - self.target.double()


class Divergence:
    """Accumulates over slices of the vocabulary, in any order of tokens.

    Args:
        targets: int64 [tokens], the token that really follows.
        beside: another model's divergence from the same base, which `add_all` adds to together with this one.
    """

    def __init__(self, targets: torch.Tensor, beside: Divergence | None = None) -> None:
        self.base: _Distribution = _Distribution(targets) if beside is None else beside.base
        self.other = _Distribution(targets)
        self._gap = torch.zeros(targets.shape, dtype=torch.float64)

    def add(self, tokens: slice, first: int, base: torch.Tensor, other: torch.Tensor) -> None:
        """Logits float32 [tokens, n] of vocabulary entries first to first + n - 1; slices must come in this order."""
        add_all([self], tokens, first, base, [other])

    def kl(self) -> torch.Tensor:
        """KL(base || other) in nats, float64 [tokens]."""
        return self._gap / self.base.sum - self.base.normalizer() + self.other.normalizer()

    def agreement(self) -> torch.Tensor:
        """Whether both put the same token first, bool [tokens]; of tied tokens the first counts."""
        return self.base.best[:, 0] == self.other.best[:, 0]

    def overlap(self) -> torch.Tensor:
        """How much of the base's TOP likeliest tokens are among the other's, 0 to 1, float64 [tokens]."""
        same = self.base.best[:, :, None] == self.other.best[:, None, :]
        return same.any(dim=2).double().mean(dim=1)


def add_all(
    divergences: Sequence[Divergence], tokens: slice, first: int, base: torch.Tensor, others: Iterable[torch.Tensor]
) -> None:
    """`Divergence.add` for several models beside one base, whose logits are looked at once.

    Args:
        others: of each model, in their order. They may be made as they are taken.
    """
    powers, factor = divergences[0].base.add(tokens, first, base)
    for divergence, other in zip(divergences, others, strict=True):
        divergence.other.add(tokens, first, other)
        gap = (base - other).mul_(powers).sum(dim=-1).double()
        divergence._gap[tokens] = divergence._gap[tokens] * factor + gap
