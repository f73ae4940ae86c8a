"""How much errors of each linear matter to what the model says: gradients, back through one float layer at a time.

The float model runs over the calibration text once, and what enters each layer is kept on disk. Then gradients of log p
of tokens drawn from the model go back through the layers. Of each group of linears that share their input the sums of
squared gradients by their outputs are kept, per token and per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qtool import transfers
from qtool.engines.native.float_pass import FloatPass
from qtool.engines.native.units import LayerLinears
from qtool.model.decoder import DecoderStream
from qtool.model.gradients import gradients, head_gradient, replaced
from qtool.model.state import Batch
from qtool.model.statefile import StateFile
from qtool.quant.importance import Importance

if TYPE_CHECKING:
    from qtool.workers import Report

Linears = Callable[[int, nn.Module], tuple[LayerLinears, bool]]
"""Of a loaded layer; and whether what its routed experts give is simply added to what leaves it."""


@dataclass(frozen=True)
class Importances:
    """Of the linears of all layers, in files of this folder."""

    folder: Path

    def path(self, index: int) -> Path:
        """The file of a layer."""
        return self.folder / f"importance-{index}"

    def of(self, index: int) -> dict[str, Importance]:
        """Of a layer's groups of linears, by the first linear of each; a group that has none there counts all alike."""
        path = self.path(index)
        if not path.exists():  # text doesn't go through this layer
            return {}
        found = load_file(path)
        names = {name.removesuffix(".tokens") for name in found if name.endswith(".tokens")}
        return {name: Importance(found[f"{name}.tokens"], found[f"{name}.rows"]).weights() for name in names}


@dataclass(frozen=True)
class Backward:
    """The passes that find them.

    Attributes:
        model: a decoder that hands on hidden states and nothing else.
        ids: calibration tokens, int64 [samples, length].
        batch_tokens: that go through a layer at a time, with all that a gradient needs.
        linears: tells a loaded layer's linears.
        importances: whose files are written.
        report: hears of the progress.
    """

    model: DecoderStream
    ids: torch.Tensor
    batch_tokens: int
    linears: Linears
    importances: Importances
    report: Report

    def run(self) -> None:
        """Write the file of every layer. Raises InputError for models whose experts can't be followed."""
        depth = self.model.depth
        self._forward()
        with self._states("gradient", depth, last=True) as gradient:
            with self._states(f"passing-{depth}", depth, last=True) as leaving:
                self._head(leaving, gradient)
            for index in reversed(range(depth)):
                self.report.progress("gradients", depth - 1 - index, depth, "layers")
                with self._states(f"passing-{index}", index, last=True) as entering:
                    if not self.model.is_idle(index):
                        self._layer(index, entering, gradient)
        self.report.progress("gradients", depth, depth, "layers")

    @contextmanager
    def _states(self, name: str, index: int, *, last: bool = False) -> Iterator[StateFile]:
        """What enters layer `index`, or is shaped like it; after the last use the file is removed."""
        path, layout = self.importances.folder / name, self.model.entering(index, self.ids.shape[1])
        states = StateFile(path, len(self.ids), layout, threads=transfers.asynchronous(self.model.device))
        try:
            yield states
        finally:
            states.close()
            if last:
                path.unlink(missing_ok=True)

    def _samples(self) -> Iterator[slice]:
        step = max(1, self.batch_tokens // self.ids.shape[1])
        for start in range(0, len(self.ids), step):
            yield slice(start, min(start + step, len(self.ids)))

    def _forward(self) -> None:
        model = self.model
        with self._states("passing-0", 0) as first:
            first.write(0, model.prologue(self.ids).state)
        for index in range(model.depth):
            self.report.progress("forward", index, model.depth, "layers")
            with (
                self._states(f"passing-{index}", index) as entering,
                self._states(f"passing-{index + 1}", index + 1) as leaving,
            ):
                floats = FloatPass(model, index, self.ids, self.batch_tokens, entering, leaving)
                if model.is_idle(index):
                    floats.pass_on()
                else:
                    with model.layer(index) as layer:
                        floats.run(layer, {})
        self.report.progress("forward", model.depth, model.depth, "layers")

    def _head(self, leaving: StateFile, gradient: StateFile) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for rows in self._samples():
                (hidden,) = leaving.read(rows.start, rows.stop)
                (drawn,) = head_gradient(self.model, hidden.to(self.model.device), 1, lambda _: None)
                gradient.write(rows.start, (drawn,))

    def _layer(self, index: int, entering: StateFile, gradient: StateFile) -> None:
        """Sum up squared gradients of a layer, and take `gradient` back through it."""
        model, routed = self.model, self.model.routed(index)
        with model.layer(index) as layer:
            linears, added = self.linears(index, layer)
            if not added:
                raise model.unusual(
                    "what its experts give goes through something else, which effort: high can't follow"
                )
            names = [name for group in linears.groups for name in group.linears]
            sums = {name: _Squares() for name in names}
            for rows in self._samples():
                (x,), (g,) = (each.read(rows.start, rows.stop) for each in (entering, gradient))
                x, g = x.to(model.device), g.to(model.device)
                with torch.enable_grad(), replaced(routed) as passages, _outputs(layer, names) as outputs:
                    x = x.detach().requires_grad_()
                    left = model.run(index, layer, Batch(self.ids[rows], (x,), range(rows.start, rows.stop))).hidden
                (found,) = gradients(routed, passages, left, [x, *outputs.values()], g[None]).by
                gradient.write(rows.start, (found[0],))
                for name, by in zip(outputs, found[1:], strict=True):
                    sums[name].add(by)
        groups = [(group.linears[0], [sums[name] for name in group.linears]) for group in linears.groups]
        together = {first: _together(members, self.ids.numel()) for first, members in groups}
        content = {name: each for name, each in together.items() if each is not None}
        tokens = {f"{name}.tokens": each.tokens for name, each in content.items()}
        save_file(tokens | {f"{name}.rows": each.rows for name, each in content.items()}, self.importances.path(index))


class _Squares:
    """Sums of squares of what a linear's output has as gradient [..., out], in tokens and rows."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.rows: torch.Tensor | None = None

    def add(self, by: torch.Tensor) -> None:
        squares = by.reshape(-1, by.shape[-1]).float().square()
        rows = squares.sum(dim=0)
        self.tokens.append(squares.sum(dim=1))
        self.rows = rows if self.rows is None else self.rows + rows


def _together(members: list[_Squares], tokens: int) -> Importance | None:
    """Of several linears; None where their outputs aren't one row per token."""
    rows = [each.rows for each in members if each.rows is not None]
    per_token = [torch.cat(each.tokens) for each in members if each.tokens]
    if len(rows) < len(members) or any(len(each) != tokens for each in per_token):
        return None
    return Importance(torch.stack(per_token).sum(dim=0).cpu(), torch.cat(rows).cpu())


@contextmanager
def _outputs(layer: nn.Module, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block, what linears of these names give when they are called."""
    outputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def keep(_: nn.Module, _args: object, output: torch.Tensor, name: str = name) -> None:
                outputs[name] = output

            stack.callback(layer.get_submodule(name).register_forward_hook(keep).remove)
        yield outputs
