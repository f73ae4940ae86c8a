"""Gradients of log p, of tokens drawn from the model: through the head, a layer, and its routed experts one by one.

While a layer runs, a leaf of the graph takes the place of what its experts give. That is added to the layer's output
(`model.probe` makes sure), so the leaf's value changes no gradient, and the experts can follow one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qtool.model.decoder import DecoderStream
from qtool.model.experts import RoutedExperts, handled

_ROWS = 4096  # of the output projection, at a time
_HEAD_TOKENS = 1024  # through the output projection, at a time


@dataclass(frozen=True)
class Passage:
    """What a run of the layer sent to its experts.

    Attributes:
        hidden: their input [tokens, hidden], in the graph.
        chosen: expert numbers [tokens, k].
        weights: of these [tokens, k], in the graph.
        output: the leaf [tokens, hidden].
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor

    def detached(self) -> Passage:
        """The same without the graph."""
        return Passage(self.hidden.detach(), self.chosen, self.weights.detach(), self.output.detach())

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens [n], places among the chosen [n], routing weights [n, 1]) of an expert; without gradients."""
        tokens, places = torch.where(self.chosen == expert)
        return tokens, places, self.weights.detach()[tokens, places, None]


@contextmanager
def replaced(module: RoutedExperts | None) -> Iterator[list[Passage]]:
    """Within the block a run of the layer appends its passage in place of calling the experts."""
    passages: list[Passage] = []

    def leave(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        passages.append(Passage(hidden, chosen, weights, torch.zeros_like(hidden).requires_grad_()))
        return passages[-1].output

    if module is None:
        yield passages
    else:
        with handled(module, leave):
            yield passages


@dataclass(frozen=True)
class Gradients:
    """Of a layer's output.

    Attributes:
        by: per draw, by each of the tensors asked for.
        by_experts: by what the experts gave, [draws, tokens, hidden]; None where none were called.
    """

    by: list[list[torch.Tensor]]
    by_experts: torch.Tensor | None


def gradients(
    module: RoutedExperts | None,
    passages: Sequence[Passage],
    output: torch.Tensor,
    by: Sequence[torch.Tensor],
    seeds: torch.Tensor,
) -> Gradients:
    """Gradients of a layer's output, through its experts.

    Args:
        passages: of this run, from `replaced`.
        by: tensors of the graph.
        seeds: gradients by the output, [draws, ...].
    """
    if module is None or not passages:
        return Gradients([grad([output], by, [seed], i + 1 < len(seeds)) for i, seed in enumerate(seeds)], None)
    (passage,) = passages
    by_output = torch.stack([grad([output], [passage.output], [seed], True)[0] for seed in seeds])
    by_hidden = torch.zeros(len(seeds), *passage.hidden.shape, device=output.device)
    by_weights = torch.zeros(len(seeds), *passage.weights.shape, device=output.device)
    for number in range(len(module.names)):
        tokens, places, weights = passage.of(number)
        if not len(tokens):
            continue
        expert = module.expert(number)
        with torch.enable_grad():
            x = passage.hidden.detach()[tokens].requires_grad_()
            given = expert.output(expert.inner(x))
        for draw, all_tokens in enumerate(by_output):
            g = all_tokens[tokens]
            by_weights[draw, tokens, places] = (g * given.detach()).sum(dim=-1).float()
            (by_x,) = grad([given], [x], [g * weights], draw + 1 < len(seeds))
            by_hidden[draw].index_add_(0, tokens, by_x.float())
    found = [
        grad([output, passage.hidden, passage.weights], by, [seed, *rest], draw + 1 < len(seeds))
        for draw, (seed, *rest) in enumerate(zip(seeds, by_hidden, by_weights, strict=True))
    ]
    return Gradients(found, by_output)


def grad(
    outputs: Sequence[torch.Tensor], by: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], keep: bool
) -> list[torch.Tensor]:
    """Gradients of the outputs together, in their types; zeros by what none of them depends on."""
    if not by:
        return []
    pairs = [
        (output, seed.to(output.dtype)) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad
    ]
    found = torch.autograd.grad(
        [output for output, _ in pairs], list(by), [seed for _, seed in pairs], retain_graph=keep, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


def head_gradient(stream: DecoderStream, hidden: torch.Tensor, draws: int, tell: Callable[[int], None]) -> torch.Tensor:
    """Gradient of log p(y) by what leaves the last layer, y drawn from p, a slice of the vocabulary at a time.

    By the logits it is onehot(y) - p; y is drawn as the largest logit plus Gumbel noise, which needs no p.

    Args:
        hidden: what leaves the last layer, [samples, length, hidden].
        draws: tokens drawn per position; each costs a backward pass and steadies the estimate.
        tell: hears how many tokens are done.

    Returns:
        float32 [draws, samples, length, hidden].
    """
    flat = hidden.reshape(-1, hidden.shape[2])
    result = torch.zeros(draws, *flat.shape, device=flat.device)
    for start in range(0, len(flat), _HEAD_TOKENS):
        tell(start)
        tokens = slice(start, start + _HEAD_TOKENS)
        with torch.enable_grad():
            x = flat[tokens].detach().requires_grad_()
            normalized = stream.head.normalize(x)
        drawn, normalizer = _draw(stream, normalized.detach(), draws)
        total = torch.zeros(draws, *normalized.shape, device=flat.device)
        for first, stop in _slices(stream.head.vocabulary):
            rows = stream.head.rows(first, stop)
            with torch.enable_grad():
                leaf = normalized.detach().requires_grad_()
                logits = stream.head.logits(leaf, rows)
            p = (logits.detach() - normalizer[:, None]).exp()
            for draw in range(draws):
                wanted = -p
                inside = (drawn[draw] >= first) & (drawn[draw] < stop)
                wanted[inside.nonzero()[:, 0], drawn[draw][inside] - first] += 1
                total[draw] += _gradient(logits, leaf, wanted, draw + 1 < draws)
        for draw in range(draws):
            result[draw, tokens] = _gradient(normalized, x, total[draw], draw + 1 < draws)
    tell(len(flat))
    return result.view(draws, *hidden.shape)


def _gradient(output: torch.Tensor, by: torch.Tensor, seed: torch.Tensor, keep: bool) -> torch.Tensor:
    """The gradient by one tensor."""
    return torch.autograd.grad(output, by, seed.to(output.dtype), retain_graph=keep)[0]


def _draw(stream: DecoderStream, normalized: torch.Tensor, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens drawn from the model's distribution, int64 [draws, tokens]; their normalizer, float32 [tokens])."""
    count = len(normalized)
    best = torch.full((draws, count), -torch.inf, device=normalized.device)
    drawn = torch.zeros((draws, count), dtype=torch.int64, device=normalized.device)
    sums = []
    for first, stop in _slices(stream.head.vocabulary):
        logits = stream.head.logits(normalized, stream.head.rows(first, stop))
        sums.append(logits.logsumexp(dim=1))
        for draw in range(draws):
            gumbel = -torch.empty_like(logits).exponential_().log_()
            largest, place = (logits + gumbel).max(dim=1)
            drawn[draw] = torch.where(largest > best[draw], place + first, drawn[draw])
            best[draw] = torch.maximum(best[draw], largest)
    return drawn, torch.stack(sums).logsumexp(dim=0)


def _slices(vocabulary: int) -> Iterator[tuple[int, int]]:
    for first in range(0, vocabulary, _ROWS):
        yield first, min(first + _ROWS, vocabulary)
