"""Quantizes all decoder layers, float activations in hand: observe a layer, hand out its units, write what comes back.

The activations that enter a layer are those of the float model, so they are all that one layer needs of another.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtool.checkpoint.writer import CheckpointWriter
from qtool.engines.native import units
from qtool.engines.native.executor import Executor
from qtool.engines.native.units import DenseTask, ExpertTask, Float, Linear, Output, Piece, Row, Source
from qtool.model.activations import Activations
from qtool.model.decoder import DecoderStream
from qtool.model.experts import RoutedExperts, handled
from qtool.model.probe import probe
from qtool.model.recorder import Recorder
from qtool.model.weights import refuse_damage
from qtool.quant import exact
from qtool.quant.layer import GroupReport, policy_of
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, linear_layers, signature
from qtool.recipe.schema import Policy

if TYPE_CHECKING:
    from qtool.workers import Report

_LOT_ELEMENTS = 1 << 26  # weights of the experts that make one task
_LAYER, _DENSE = "layer", "dense"


class Layers:
    """The decoder layers of one job.

    Args:
        stream: the float model.
        source: what the units need to know of it.
        policies: per linear, by the checkpoint's name without ".weight"; None leaves it float.
        writer: takes the result, and has the records of the run that this one resumes.
        executor: runs the units.
        report: hears of the progress.
        exact: follow Golden Stick step for step.
        batch_tokens: how many go through a layer at a time.
        layers_ahead: how many layers may have run while their units are not written yet.
        expert_tokens: how many an expert's statistics need.
    """

    def __init__(
        self,
        stream: DecoderStream,
        source: Source,
        policies: dict[str, Policy | None],
        writer: CheckpointWriter,
        executor: Executor,
        report: Report,
        *,
        exact: bool,
        batch_tokens: int,
        layers_ahead: int,
        expert_tokens: int,
    ) -> None:
        self._stream, self._source, self._policies = stream, source, policies
        self._writer, self._executor, self._report = writer, executor, report
        self._exact, self._batch_tokens, self._expert_tokens = exact, batch_tokens, expert_tokens
        self._layers_ahead = layers_ahead
        # What to do with results, in the order in which units were submitted: tensors lie in the files in that order.
        self._waiting: deque[Callable[[], None]] = deque()
        self._topology: dict[Any, list[Group]] = {}
        self._shape = (0, 0)
        self._finished: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.experts: list[dict[str, Any]] = []

    def quantize(self, ids: torch.Tensor) -> None:
        """Write every layer; `rows` and `experts` then hold how it went.

        Args:
            ids: calibration tokens [samples, length].
        """
        self._shape = (ids.shape[0], ids.shape[1])
        done = self._take_over()
        hidden = self._hidden(done)
        entering = self._stream.prologue(ids)  # it teaches the stream the layers' arguments as well
        if done == 0:
            hidden.write(0, entering.reshape(-1, entering.shape[-1]))
        del entering
        self._report.progress("quantize", done, self._stream.depth, "layers")
        for index in range(done, self._stream.depth):
            leaving = self._hidden(index + 1)
            self._layer(index, hidden, leaving, dict(self._finished) if index == done else {})
            hidden.close()
            self._settle(2 * self._layers_ahead)  # each layer waits twice: for its linears, and to be finished
            hidden = leaving
        self._settle(0)
        hidden.close()

    def _settle(self, most: int) -> None:
        """Deal with results until no more than so many wait."""
        while len(self._waiting) > most:
            self._waiting.popleft()()

    def _finish_layer(
        self, index: int, hidden: Path, leaving: Path, more: list[dict[str, Any]], experts: list[dict[str, Any]]
    ) -> None:
        """All units of a layer are written; `more` are the reports of all but its own linears."""
        self._write_rest(index)
        name, rows = self._stream.layer_name(index), [*self._finished[_DENSE]["rows"], *more]
        rows = [{"layer": name, **row} for row in rows]
        self.rows += rows
        self.experts += experts
        record = {"unit": _LAYER, "layer": index, "rows": rows, "experts": experts}
        self._writer.mark(record, needs=[leaving], obsolete=[hidden])
        self._finished = {}
        self._report.progress("quantize", index + 1, self._stream.depth, "layers")

    def _take_over(self) -> int:
        """The records of the run that this one resumes; returns how many layers are finished."""
        done = 0
        for record in self._writer.records:
            if record["unit"] == _LAYER:
                self.rows += record["rows"]
                self.experts += record["experts"]
                self._finished, done = {}, record["layer"] + 1
            else:
                self._finished[record["unit"]] = record
        return done

    def _finish(self, unit: str, **record: Any) -> None:
        """A unit of the current layer is written."""
        self._finished[unit] = record
        self._writer.mark({"unit": unit, **record})

    def _hidden(self, index: int) -> Activations:
        """What enters a layer, or leaves the one before it."""
        tokens = self._shape[0] * self._shape[1]
        path = self._writer.folder / f"hidden-{index}"
        return Activations(path, tokens, self._stream.hidden_size, self._stream.dtype, keep=True)

    def _layer(self, index: int, hidden: Activations, leaving: Activations, done: Mapping[str, Any]) -> None:
        """Run one layer, from `hidden` to `leaving`, and submit its units but those that are `done`."""
        stream = self._stream
        prefix = stream.layer_name(index) + "."
        routed = stream.routed(index)
        with ExitStack() as stack:
            with stream.layer(index) as layer:
                stored = {name: stream.stored_name(prefix + name) for name, _ in layer.named_parameters()}
                policies = {
                    name: self._policies[stored[f"{name}.weight"].removesuffix(".weight")]
                    for name in linear_layers(layer)
                }
                key = signature(layer)
                if key not in self._topology:
                    self._topology[key] = probe(self._stream, index, layer)
                groups = self._topology[key]
                if self._exact:
                    rows = self._quantize_exactly(index, layer, groups, policies, stored, hidden, leaving)
                    self._finished[_DENSE] = {"rows": rows}
                    self._finish_layer(index, hidden.path, leaving.path, [], [])
                    return
                recorder = stack.enter_context(Recorder(self._writer.folder, hidden)) if routed else None
                statistics = self._observe(index, layer, groups, policies, hidden, leaving, recorder)
                router = layer.get_parameter(routed.router).cpu().float() if routed and routed.router else None
            # The layer's weights are gone: a unit reads what it needs of them.
            if _DENSE not in done:
                task = DenseTask(self._source, groups, policies, statistics, stored)
                self._waiting.append(partial(self._finish_dense, self._executor.submit(units.quantize_dense, task)))
                del task
            del statistics
            if not self._layers_ahead:
                self._settle(0)
            more: list[dict[str, Any]] = []
            experts: list[dict[str, Any]] = []
            if routed is not None and recorder is not None:
                more, seen = self._routed(index, routed, recorder, router, leaving, done)
                experts = [{"layer": stream.layer_name(index), **seen}]
        self._waiting.append(partial(self._finish_layer, index, hidden.path, leaving.path, more, experts))

    def _finish_dense(self, pieces: Callable[[], Iterable[Piece]]) -> None:
        reports, _ = self._write(pieces())
        self._finish(_DENSE, rows=[dataclasses.asdict(report) for report in reports])

    def _observe(
        self,
        index: int,
        layer: nn.Module,
        groups: list[Group],
        policies: dict[str, Policy | None],
        hidden: Activations,
        leaving: Activations,
        recorder: Recorder | None,
    ) -> dict[str, InputStatistics]:
        """Run the float layer on all samples, from `hidden` to `leaving`; statistics of each group's input.

        Raises InputError when activations can't be true: the weights before them are damaged.
        """
        samples, length = self._shape
        stride = max(1, samples * length // units.SAMPLE_TOKENS)
        statistics = {
            group.linears[0]: InputStatistics(stride=stride, with_gram=policy.rounding == "gptq")
            for group in groups
            if (policy := policy_of(group, policies)) is not None
        }
        routed = self._stream.routed(index)
        with _observing(layer, statistics):
            if routed is None or recorder is None:
                self._run(index, layer, hidden, leaving)
            else:
                with handled(routed, recorder):
                    self._run(index, layer, hidden, leaving)
        self._refuse_damage(index, statistics)
        return statistics

    def _refuse_damage(self, index: int, statistics: Mapping[str, InputStatistics]) -> None:
        for name, seen in statistics.items():
            refuse_damage(seen.amax, f"{self._stream.layer_name(index)}.{name}", self._stream.weights)

    def _run(self, index: int, layer: nn.Module, hidden: Activations, leaving: Activations) -> None:
        samples, length = self._shape
        batch = max(1, self._batch_tokens // length)
        for sample in range(0, samples, batch):
            start, stop = sample * length, min(sample + batch, samples) * length
            x = hidden.read(start, stop).reshape(-1, length, hidden.width).to(self._stream.device)
            output = self._stream.run(index, layer, x).reshape(-1, hidden.width)
            refuse_damage(output, self._stream.layer_name(index), self._stream.weights)
            leaving.write(start, output)

    def _quantize_exactly(
        self,
        index: int,
        layer: nn.Module,
        groups: list[Group],
        policies: dict[str, Policy | None],
        stored: dict[str, str],
        hidden: Activations,
        leaving: Activations,
    ) -> list[dict[str, Any]]:
        samples, length = self._shape
        statistics = {
            group.linears[0]: InputStatistics(stride=1, with_gram=False)
            for group in groups
            if policy_of(group, policies) is not None
        }
        with _observing(layer, statistics):
            self._run(index, layer, hidden, leaving)
        self._refuse_damage(index, statistics)
        layer.float()
        inputs = hidden.read(0, hidden.rows).reshape(samples, length, -1)
        runs = [partial(self._stream.run, index, layer, inputs[row : row + 1]) for row in range(samples)]
        dtype = self._stream.weights.dtype(stored[groups[0].linears[0] + ".weight"])
        result = exact.quantize_layer(layer, groups, policies, statistics, self._source.storage(dtype), runs)
        quantized = {f"{name}.{part}" for name in result.linears for part in ("weight", "bias")}
        pieces: list[Piece] = [
            Linear(stored[f"{name}.weight"].removesuffix(".weight"), linear) for name, linear in result.linears.items()
        ]
        pieces += [Float(stored[name], p.detach()) for name, p in layer.named_parameters() if name not in quantized]
        self._write(pieces)
        self._write_rest(index)
        return [dataclasses.asdict(report) for report in result.groups]

    def _routed(
        self,
        index: int,
        module: RoutedExperts,
        recorder: Recorder,
        router: torch.Tensor | None,
        leaving: Activations,
        done: Mapping[str, Any],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The routed experts: write them but those that are `done`, and add what all give to `leaving`."""
        count = len(module.names)
        routing = recorder.routing(count)
        counts = routing.counts(count)
        policies = [self._expert_policies(module, expert) for expert in range(count)]
        needy = [any(map(units.needs_statistics, wanted.values())) for wanted in policies]
        short = [e for e in range(count) if needy[e] and counts[e] < self._expert_tokens]
        extra = recorder.likely(short, counts, routing, router, self._expert_tokens)
        stream = self._stream
        shape = stream.weights.shape(f"{module.names[0].gate}.weight")
        size = max(1, _LOT_ELEMENTS // (3 * shape[0] * shape[1]))

        def finish(unit: str, rows: torch.Tensor, pieces: Callable[[], Iterable[Piece]]) -> None:
            reports, output = self._write(pieces())
            if output is not None:
                sums.scatter(rows, sums.gather(rows) + output)
            if unit not in done:
                self._finish(unit, rows=[dataclasses.asdict(report) for report in reports])

        with Activations(self._writer.folder / "experts", leaving.rows, leaving.width, torch.float32) as sums:
            for start in range(0, count, size):
                lot = [*range(start, min(start + size, count))]
                unit = f"experts {lot[0]} to {lot[-1]}"
                wanted = [policies[expert] for expert in lot]
                todo = unit not in done
                inputs = recorder.inputs(lot, routing, extra if todo else {})
                task = ExpertTask(self._source, index, lot, wanted, inputs, todo)
                pieces = self._executor.submit(units.quantize_experts, task)
                self._waiting.append(partial(finish, unit, inputs.rows, pieces))
                del task, inputs
                self._settle(self._executor.ahead)
            self._settle(0)
            for start in range(0, leaving.rows, self._batch_tokens):
                stop = min(start + self._batch_tokens, leaving.rows)
                output = leaving.read(start, stop).float() + sums.read(start, stop)
                refuse_damage(output, stream.layer_name(index), stream.weights)
                leaving.write(start, output)
        found = [row for unit, record in self._finished.items() if unit != _DENSE for row in record["rows"]]
        return _summarized(found), {"tokens": counts, "topped_up": {str(e): len(extra[e]) for e in short}}

    def _expert_policies(self, module: RoutedExperts, expert: int) -> dict[str, Policy | None]:
        names = module.names[expert]
        return {part: self._policies[name] for part, name in zip(units.PARTS, names, strict=True)}

    # ------------------------------------------------------------------ writing

    def _write(self, pieces: Iterable[Piece]) -> tuple[list[GroupReport], torch.Tensor | None]:
        """Write what a unit gives; returns its reports, and what its experts give."""
        reports: list[GroupReport] = []
        output = None
        weights = self._stream.weights
        for piece in pieces:
            match piece:
                case Linear(name, linear):
                    self._writer.add_linear(name, linear, weights.dtype(f"{name}.weight"))
                case Float(name, tensor):
                    self._writer.add(name, tensor.to(weights.dtype(name)))
                case Row(report):
                    reports.append(report)
                case Output(tensor):
                    output = tensor
        return reports, output

    def _write_rest(self, index: int) -> None:
        """Every tensor of a layer that is not written yet, as it is."""
        prefix = self._stream.layer_name(index) + "."
        for name in self._stream.weights.names:
            linear, _, part = name.rpartition(".")
            quantized = part in ("weight", "bias") and self._policies.get(linear) is not None
            if name.startswith(prefix) and name not in self._writer and not quantized:
                self._writer.add(name, self._stream.weights.unchanged(name))


def _summarized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for the same group of all experts, with the mean of their errors and the widest of their ranges."""
    by_group: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by_group.setdefault(tuple(row["linears"]), []).append(row)
    return [
        {
            **same[0],
            "linears": [f"experts.*.{linear}" for linear in linears],
            "alpha": None,
            "relative_error": sum(row["relative_error"] for row in same) / len(same),
            **{when: _combined([row[when] for row in same]) for when in ("input", "smoothed")},
        }
        for linears, same in by_group.items()
    ]


def _combined(ranges: list[dict[str, float]]) -> dict[str, float]:
    return {
        "low": min(range_["low"] for range_ in ranges),
        "high": max(range_["high"] for range_ in ranges),
        "typical": sum(range_["typical"] for range_ in ranges) / len(ranges),
    }


@contextmanager
def _observing(layer: nn.Module, statistics: dict[str, InputStatistics]) -> Iterator[None]:
    """Within the block, what enters the linears of these names is counted."""
    with ExitStack() as stack:
        for name, seen in statistics.items():
            hook = layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
            stack.callback(hook.remove)
        yield
