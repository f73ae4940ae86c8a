"""Which work comes when: run a float layer and observe it, hand out its units, write what comes back.

The activations that enter a layer are those of the float model, so they are all that one layer needs of another: with
other processes at work, the next layers run while the units of those before are under way. Results are dealt with in
the order in which their units began, since tensors lie in the files in that order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtool import transfers
from qtool.engines.native import lots, units
from qtool.engines.native.device import Room
from qtool.engines.native.exact import quantize_exactly
from qtool.engines.native.executor import Executor, Pending
from qtool.engines.native.float_pass import FloatPass, Replay
from qtool.engines.native.importance import Backward, Importances
from qtool.engines.native.ledger import DENSE, LayerEnd, Ledger
from qtool.engines.native.pieces import PieceWriter
from qtool.engines.native.units import DenseTask, LayerLinears
from qtool.model.activations import Activations, Resident
from qtool.model.observe import sample_stride
from qtool.model.probe import Probed, probe
from qtool.model.recorder import Recorder
from qtool.model.statefile import StateFile
from qtool.quant.cache import CacheStatistics
from qtool.quant.group import needs_hessian
from qtool.quant.importance import Importance
from qtool.quant.report import GroupReport
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import signature

if TYPE_CHECKING:
    from qtool.engines.native.prepare import Prepared
    from qtool.engines.report import ExpertTokens
    from qtool.workers import Report


@dataclass(frozen=True)
class _DenseUnit:
    """The linears of a layer, under way."""

    pieces: Pending


@dataclass(frozen=True)
class _LotUnit:
    """Some experts of a layer, under way.

    Attributes:
        name: of the unit.
        quantized: whether their linears are among the pieces, and not only their output.
        tokens: whose output it is, int64 [n].
        sums: takes the output of all experts.
    """

    pieces: Pending
    name: str
    quantized: bool
    tokens: torch.Tensor
    sums: Activations | Resident


_GRADIENT_SHARE = 4  # of the tokens that go through a layer at a time go through it with gradients
_Waiting = _DenseUnit | _LotUnit | LayerEnd


class Schedule:
    """The decoder layers of one job.

    Args:
        prepared: the job.
        output: takes the tensors.
        ledger: knows what is finished, and hears what is.
        executor: runs the units.
        report: hears of the progress.
    """

    def __init__(
        self, prepared: Prepared, output: PieceWriter, ledger: Ledger, executor: Executor, report: Report
    ) -> None:
        self._prepared, self._output, self._ledger = prepared, output, ledger
        self._executor, self._report = executor, report
        self._model = prepared.model
        self._waiting: deque[_Waiting] = deque()
        self._groups: dict[Any, Probed] = {}
        self._importances = Importances(ledger.folder) if prepared.job.recipe.effort == "high" else None
        planned, here = prepared.on_device, not executor.ahead
        # What units of this process find on the device needs no way back to it.
        self._keeps_weights = here and planned is not None and planned.keeps_weights
        self._keeps_tokens = here and planned is not None and planned.keeps_tokens
        batch = prepared.estimate.batch_tokens if planned is None else planned.batch_tokens
        self._tokens = Room(batch, prepared.job.calibration.seq_len, self._take_less)

    def run(self, ids: torch.Tensor) -> None:
        """Write every layer that isn't finished.

        Args:
            ids: calibration tokens [samples, length].

        Raises InputError where weights are damaged, and QtoolError.
        """
        model, done = self._model, self._ledger.layers
        if self._importances is not None and not self._ledger.is_weighed:
            self._weigh(ids, self._importances)
        hidden = self._states(done, ids)
        if done == 0:
            hidden.write(0, model.prologue(ids).state)
        self._report.progress("quantize", done, model.depth, "layers")
        if model.is_shown:
            self._tokens.size = ids.shape[1]  # a picture's states go through layers with it alone
        for index in range(done, model.depth):
            leaving = self._states(index + 1, ids)
            floats = FloatPass(model, index, ids, self._tokens.size, hidden, leaving)
            if index + 1 < model.depth and transfers.asynchronous(model.device):
                model.checkpoint.expect(f"{name}.weight" for name in model.layer_linears(index + 1).values())
            if model.is_idle(index):
                floats.pass_on()
                self._waiting.append(self._end(floats))
            elif self._prepared.job.recipe.osl == "exact":
                self._exact_layer(floats)
            else:
                self._layer(floats)
            hidden.close()
            self._settle(2 * self._layers_ahead)  # each layer waits twice: for its linears, and to be finished
            hidden = leaving
        self._settle(0)
        self._output.wait()
        hidden.close()

    def _weigh(self, ids: torch.Tensor, importances: Importances) -> None:
        """Find out how much errors of each linear matter."""
        batch = max(ids.shape[1], self._tokens.size // _GRADIENT_SHARE)
        Backward(self._model, ids, batch, self._linears, importances, self._report).run()
        paths = [importances.path(index) for index in range(self._model.depth)]
        self._ledger.finish_importance([path for path in paths if path.exists()])

    @cached_property
    def _layers_ahead(self) -> int:
        return self._prepared.estimate.layers_ahead

    def _take_less(self, tokens: int) -> None:
        """The device's memory ran out."""
        self._keeps_weights = self._keeps_tokens = False
        self._report.warning(f"the device's memory ran out: from here on {tokens} tokens go through a layer at a time")

    def _states(self, index: int, ids: torch.Tensor) -> StateFile:
        """What enters a layer, or leaves the one before it."""
        samples, length = ids.shape
        path, layout = self._ledger.folder / f"hidden-{index}", self._model.entering(index, length)
        return StateFile(path, samples, layout, threads=transfers.asynchronous(self._model.device))

    # ------------------------------------------------------------------ one layer

    def _layer(self, floats: FloatPass) -> None:
        """Run a layer and hand out the units of it that aren't finished."""
        index, routed = floats.index, self._model.routed(floats.index)
        with ExitStack() as stack:
            if self._keeps_weights:
                weights = (f"{linear}.weight" for linear in self._model.layer_linears(index).values())
                stack.enter_context(self._model.weights.holding(weights))
            with self._model.layer(index) as layer:
                linears, added = self._linears(index, layer)
                statistics, caches, recorder = self._run(floats, layer, linears, added, stack)
                router = layer.get_parameter(routed.router).float() if routed and routed.router else None
            experts: list[ExpertTokens] = []
            if recorder and not added:
                found = lots.after_run(self._prepared, index, recorder, router)
                self._experts_within(floats, found, statistics)
                experts = [found.tokens(self._model.layer_name(index))]
                recorder = None
            # The layer's weights are gone: a unit reads what it needs of them.
            if linears.groups and not self._ledger.is_finished(index, DENSE):
                task = DenseTask(linears, statistics, caches)
                self._waiting.append(_DenseUnit(self._executor.submit(units.quantize_dense, task)))
                del task
            del statistics
            if not self._layers_ahead:
                self._settle(0)
            if recorder:
                found = lots.after_run(self._prepared, index, recorder, router)
                self._experts(floats, found)
                experts = [found.tokens(self._model.layer_name(index))]
        self._waiting.append(self._end(floats, experts=experts))

    def _run(
        self, floats: FloatPass, layer: nn.Module, linears: LayerLinears, added: bool, stack: ExitStack
    ) -> tuple[dict[str, InputStatistics], dict[str, CacheStatistics], Recorder | None]:
        """Run a layer once: what is known of its linears' inputs, and of its keys and values where these are to be
        quantized, and what goes into its routed experts if it has any.

        Begun again with fewer tokens at a time when the device's memory runs out.
        """
        routed = self._model.routed(floats.index)
        importance = self._importances.of(floats.index) if self._importances else {}
        attention = None if self._prepared.context.cache is None else self._model.attention(floats.index)
        observed = [] if attention is None else [attention[0]]

        def run(tokens: int) -> tuple[dict[str, InputStatistics], dict[str, CacheStatistics], Recorder | None]:
            statistics, recorder = _statistics(linears, sample_stride(floats.tokens), importance=importance), None
            caches = {name: CacheStatistics() for name in observed}
            if routed:
                recorder = Recorder(None if self._keeps_tokens else self._ledger.folder, floats.tokens)
                stack.enter_context(recorder)
            replace(floats, batch_tokens=tokens).run(layer, statistics if added else {}, recorder, caches)
            return statistics, caches, recorder

        return self._tokens.fit(run)

    def _exact_layer(self, floats: FloatPass) -> None:
        """Run a layer and write it, Golden Stick's way."""
        with self._model.layer(floats.index) as layer:
            linears, _ = self._linears(floats.index, layer)
            statistics = _statistics(linears, stride=1, with_hessian=False)
            floats.run(layer, statistics)
            storage = self._prepared.context.storage(linears.first_weight)
            written = self._output.write(quantize_exactly(layer, linears, statistics, storage, floats.runs(layer)))
        self._finish(self._end(floats, reports=written.reports))

    def _end(
        self, floats: FloatPass, *, reports: Sequence[GroupReport] = (), experts: Sequence[ExpertTokens] = ()
    ) -> LayerEnd:
        floats.leaving.flush()  # before the layer counts as finished: whoever resumes needs it
        name = self._model.layer_name(floats.index)
        return LayerEnd(name, floats.hidden.path, floats.leaving.path, reports, experts)

    def _linears(self, index: int, layer: nn.Module) -> tuple[LayerLinears, bool]:
        """Of a loaded layer; and whether what its routed experts give is simply added to what leaves it."""
        names = ((name, self._model.stored(index, name)) for name, _ in layer.named_parameters())
        stored = {name: found for name, found in names if found in self._model.weights}
        policies = {name: self._prepared.plan.policies[full] for name, full in self._model.layer_linears(index).items()}
        key = signature(layer), tuple(policies)  # not every layer has its own of all of them
        if key not in self._groups:
            self._groups[key] = probe(self._model, index, layer)
        probed = self._groups[key]
        return LayerLinears(probed.groups, policies, stored), probed.experts_are_added

    def _experts(self, floats: FloatPass, routed: lots.RoutedLayer) -> None:
        """Write a layer's experts but those that are finished, and add what all of them give to what leaves it."""
        with self._sums(floats, routed) as sums:
            floats.add(sums)

    def _experts_within(
        self, floats: FloatPass, routed: lots.RoutedLayer, statistics: Mapping[str, InputStatistics]
    ) -> None:
        """Write a layer's experts, and run the layer once more with what they give, which something else takes up."""
        with self._sums(floats, routed) as sums, self._model.layer(floats.index) as layer:
            floats.run(layer, statistics, Replay(sums))

    @contextmanager
    def _sums(self, floats: FloatPass, routed: lots.RoutedLayer) -> Iterator[Activations | Resident]:
        """Write a layer's experts but those that are finished; what all of them give, [tokens, hidden]."""
        size = floats.tokens, routed.recorder.width, torch.float32
        resident = Resident(*size, self._model.device) if self._keeps_tokens else None
        with resident or Activations(self._ledger.folder / "experts", *size) as sums:
            for lot in routed.lots():
                quantize = not self._ledger.is_finished(routed.index, lot.name)
                task = routed.task(lot, quantize=quantize)
                pieces = self._executor.submit(units.quantize_experts, task)
                self._waiting.append(_LotUnit(pieces, lot.name, quantize, task.inputs.rows, sums))
                del task, pieces
                self._settle(self._executor.ahead)
            self._settle(0)
            yield sums

    # ------------------------------------------------------------------ results

    def _settle(self, most: int) -> None:
        """Deal with results until no more than so many wait."""
        while len(self._waiting) > most:
            self._finish(self._waiting.popleft())

    def _finish(self, waiting: _Waiting) -> None:
        match waiting:
            case _DenseUnit(pieces):
                written = self._output.write(pieces())
                self._output.then(partial(self._ledger.finish_unit, DENSE, written.reports))
            case _LotUnit():
                self._finish_lot(waiting)
            case LayerEnd(experts=[]):
                self._output.then(partial(self._finish_layer, waiting))
            case LayerEnd():
                self._output.wait()  # experts that stay float may be cut out of one tensor on the device
                self._finish_layer(waiting)

    def _finish_layer(self, end: LayerEnd) -> None:
        self._output.write_rest(end.name)
        self._ledger.finish_layer(end)
        self._report.progress("quantize", self._ledger.layers, self._model.depth, "layers")

    def _finish_lot(self, lot: _LotUnit) -> None:
        written = self._output.write(lot.pieces())
        if written.output is not None:
            lot.sums.add(lot.tokens, written.output)
        if lot.quantized:
            self._output.then(partial(self._ledger.finish_unit, lot.name, written.reports))


def _statistics(
    linears: LayerLinears,
    stride: int,
    *,
    with_hessian: bool = True,
    importance: Mapping[str, Importance] | None = None,
) -> dict[str, InputStatistics]:
    """Empty ones of every group that is quantized, by its first linear; Hessians only where they are needed."""
    return {
        group.linears[0]: InputStatistics(
            stride=stride,
            with_hessian=with_hessian and any(map(needs_hessian, policies)),
            importance=(importance or {}).get(group.linears[0]),
        )
        for group in linears.groups
        if (policies := [policy for name in group.linears if (policy := linears.policies[name]) is not None])
    }
