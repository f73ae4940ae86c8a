"""What goes into a layer's routed experts, kept until the experts come one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from qtool.model.activations import Activations, Resident
from qtool.model.experts import Handler, Routing

_STEP = 4096  # tokens that are scored at a time


@dataclass(frozen=True)
class ExpertInputs:
    """What some experts of a layer see.

    Attributes:
        x: the inputs [n, hidden] of all tokens that any of them sees.
        rows: the numbers of these tokens, int64 [n], ascending.
        tokens: per expert its tokens' places in x, int64.
        weights: per expert their routing weights.
        extra: per expert the places of further tokens that only its statistics count.
    """

    x: torch.Tensor
    rows: torch.Tensor
    tokens: list[torch.Tensor]
    weights: list[torch.Tensor]
    extra: list[torch.Tensor]


class Recorder:
    """Takes the place of the experts while their layer runs: remembers every token's input and routing, adds nothing.

    Args:
        folder: where the inputs go; None keeps them on the device that they are on.
        tokens: how many there will be.
    """

    def __init__(self, folder: Path | None, tokens: int) -> None:
        self._path, self._count = folder and folder / "experts-input", tokens
        self._opened: Activations | Resident | None = None
        self._tokens = 0
        self._chosen: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._opened is not None:
            self._opened.remove()

    @property
    def width(self) -> int:
        """Of an input."""
        return self._inputs.width

    @property
    def _inputs(self) -> Activations | Resident:
        assert self._opened is not None, "the layer has not run"
        return self._opened

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._opened is None:
            size = self._count, hidden.shape[-1], hidden.dtype
            self._opened = Activations(self._path, *size) if self._path else Resident(*size, hidden.device)
        self._opened.write(self._tokens, hidden)
        self._tokens += len(hidden)
        self._chosen.append(chosen.clone())
        self._weights.append(weights.clone())
        return torch.zeros_like(hidden)

    def before(self, handler: Handler) -> Handler:
        """Remembers, and has the experts called all the same."""

        def handle(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            self(hidden, chosen, weights)
            return handler(hidden, chosen, weights)

        return handle

    def routing(self, count: int) -> Routing:
        """Of all tokens, to `count` experts."""
        return Routing(torch.cat(self._chosen).cpu(), torch.cat(self._weights).cpu(), count)

    def likely(
        self, experts: list[int], counts: list[int], routing: Routing, router: torch.Tensor | None, enough: int
    ) -> dict[int, torch.Tensor]:
        """For experts that saw less than `enough` tokens, those that fill up to it: the ones that the router scores
        highest for the expert among the tokens that it sent elsewhere; without a router, evenly spaced ones.

        Args:
            experts: their numbers.
            counts: tokens that each expert of the layer saw.
            router: float32 [all experts, hidden], on the device to compute on.

        Returns:
            Per expert the tokens' numbers, ascending, int64.
        """
        if not experts:
            return {}
        if router is None:
            scores = torch.zeros(self._tokens, len(experts))
            order = torch.arange(self._tokens)
            scores -= (order * 0.6180339887 % 1)[:, None]  # spreads evenly, however many are taken
        else:
            rows = router[experts].t()
            steps = range(0, self._tokens, _STEP)
            parts = (self._inputs.read(s, min(s + _STEP, self._tokens)).to(rows.device) for s in steps)
            scores = torch.cat([part.float() @ rows for part in parts])
        found = {}
        for column, expert in enumerate(experts):
            own = routing.tokens(expert)[0]
            scores[own, column] = -torch.inf
            missing = min(enough - counts[expert], self._tokens - len(own))
            found[expert] = scores[:, column].topk(missing).indices.sort().values.cpu()
        return found

    def seen(self, expert: int, routing: Routing, extra: dict[int, torch.Tensor]) -> torch.Tensor:
        """The inputs [n, hidden] that an expert's statistics are of: its own tokens' and those that fill up."""
        tokens = routing.tokens(expert)[0]
        return self._inputs.gather(torch.cat((tokens, extra[expert])) if expert in extra else tokens)

    def inputs(self, experts: list[int], routing: Routing, extra: Mapping[int, torch.Tensor]) -> ExpertInputs:
        """What these experts see; `extra` holds the numbers of tokens that fill up, per expert that needs some."""
        none = torch.empty(0, dtype=torch.int64)
        routed = [routing.tokens(expert) for expert in experts]
        more = [extra.get(expert, none) for expert in experts]
        rows = torch.cat([*(tokens for tokens, _ in routed), *more]).unique()
        return ExpertInputs(
            x=self._inputs.gather(rows),
            rows=rows,
            tokens=[torch.searchsorted(rows, tokens) for tokens, _ in routed],
            weights=[weights for _, weights in routed],
            extra=[torch.searchsorted(rows, tokens) for tokens in more],
        )
