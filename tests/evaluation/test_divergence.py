"""Streamed divergence against log_softmax of whole float64 logits."""

from __future__ import annotations

import pytest
import torch

from qtool.evaluation.divergence import Divergence, add_all


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
@pytest.mark.parametrize("scale", [0.1, 8.0, 200.0])
def test_it_equals_the_whole_softmax(rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 100, generator=generator) * scale
    other = base + torch.randn(30, 100, generator=generator) * scale * 0.05
    targets = torch.randint(100, (30,), generator=generator)
    divergence = Divergence(targets)
    for first in range(0, 100, rows):
        part = slice(first, first + rows)
        for tokens in (slice(0, 16), slice(16, 32)):
            divergence.add(tokens, first, base[tokens, part], other[tokens, part])
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    torch.testing.assert_close(divergence.kl(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=5e-7 + scale * 1e-6)
    for side, expected in ((divergence.base, p), (divergence.other, q)):
        torch.testing.assert_close(side.surprise(), -expected.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(divergence.agreement(), base.argmax(-1) == other.argmax(-1))
    likeliest = [[set(row.tolist()) for row in logits.topk(5).indices] for logits in (base, other)]
    overlap = [len(a & b) / 5 for a, b in zip(*likeliest, strict=True)]
    assert divergence.overlap().tolist() == pytest.approx(overlap)
    assert 0 < sum(overlap) < 30


def test_several_beside_one_base_are_each_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(9, 50, generator=generator) * 5
    others = [base + torch.randn(9, 50, generator=generator) * spread for spread in (0.1, 1.0, 4.0)]
    targets = torch.randint(50, (9,), generator=generator)
    first = Divergence(targets)
    together = [first, *(Divergence(targets, beside=first) for _ in others[1:])]
    alone = [Divergence(targets) for _ in others]
    for start in range(0, 50, 16):
        part = slice(start, start + 16)
        add_all(together, slice(0, 9), start, base[:, part], [other[:, part] for other in others])
        for divergence, other in zip(alone, others, strict=True):
            divergence.add(slice(0, 9), start, base[:, part], other[:, part])
    for one, same in zip(together, alone, strict=True):
        assert torch.equal(one.kl(), same.kl())
        assert torch.equal(one.agreement(), same.agreement())
        assert torch.equal(one.overlap(), same.overlap())
        assert torch.equal(one.base.surprise(), same.base.surprise())


def test_ties_go_to_the_first_token() -> None:
    base = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    other = torch.tensor([[1.0, 3.0, 2.0, 0.0, 2.0]])
    divergence = Divergence(torch.tensor([0]))
    for first in (0, 2, 4):
        divergence.add(slice(0, 1), first, base[:, first : first + 2], other[:, first : first + 2])
    assert divergence.agreement().tolist() == [True]


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)) * 10
    divergence = Divergence(torch.zeros(20, dtype=torch.int64))
    for first in range(0, 300, 64):
        part = logits[:, first : first + 64]
        divergence.add(slice(0, 20), first, part, part.clone())
    assert divergence.kl().tolist() == [0.0] * 20
    assert divergence.agreement().all()
