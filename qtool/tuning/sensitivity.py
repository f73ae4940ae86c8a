"""What quantizing one linear layer alone does to the model's next-token distribution: for all layers at once.

Quantizing a layer adds noise δ to its output. Up to second order KL = ½ δᵀ F δ, with F the Fisher information of the
model's own distribution: F = E[g gᵀ] with g the gradient, by that output, of log p of tokens drawn from the model. The
noise of different tokens is taken for independent, so KL per token = ½ E[(g·δ)²]. One backward pass gives g for every
layer; δ is measured, with the quantizer's own integers on the float model's activations.

Everything goes layer by layer: forward over the text, back again for the gradients, then forward once more with
calibration, quantizing each layer in every way asked for. What is kept are the hidden states and gradients between
layers: (1 + draws) · depth · tokens · hidden float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtool.engines.native.context import Context
from qtool.model.decoder import DecoderStream
from qtool.model.gradients import gradients, replaced
from qtool.model.loader import input_quantizer
from qtool.model.observe import forward, observe, sample_stride
from qtool.model.probe import probe
from qtool.model.recorder import Recorder
from qtool.model.state import Batch
from qtool.quant.layer import quantize_layer
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, bias_of, signature
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy
from qtool.tuning.backward import backward
from qtool.tuning.experts import ExpertNoise, RoutedTokens
from qtool.tuning.job import Measured, Sensitivity
from qtool.tuning.noise import Tally

if TYPE_CHECKING:
    from qtool.workers import Report

_BATCH_TOKENS = 2048

Policies = Mapping[str, Policy | None]


@dataclass
class Measurement:
    """Every group and every linear, quantized in every way.

    Attributes:
        context: the float model, in float32, and the format of the quantized one.
        ways: policies by the checkpoint's linear names, by a name for them.
        expert_tokens: how many calibration tokens an expert's statistics need.
        report: hears of the progress.
    """

    context: Context
    ways: Mapping[str, Policies]
    expert_tokens: int
    report: Report
    _groups: dict[Any, list[Group]] = field(default_factory=dict)

    @torch.no_grad()
    def measure(self, text: torch.Tensor, calibration: torch.Tensor) -> Measured:
        """The sensitivities.

        Args:
            text: int64 [windows, length], to estimate KL on.
            calibration: int64 [samples, length], for the quantizer; another text.

        Raises:
            QtoolError: the model's hidden states are not finite.
        """
        torch.manual_seed(0)
        stream, report = self.context.model, self.report
        hidden = [batch.hidden.clone() for batch in forward(stream, text, _BATCH_TOKENS, "forward", report)]
        gradients_of = backward(stream, text, hidden, _windows(text.shape[1]), report)
        states = stream.prologue(calibration)
        found = Measured([], [])
        for index in range(stream.depth):
            report.progress("quantize", index, stream.depth, "layers")
            layer = self._layer(index, states, _Flow(text, hidden[index], gradients_of[index]))
            found.groups.extend(layer.groups)
            found.linears.extend(layer.linears)
        report.progress("quantize", stream.depth, stream.depth, "layers")
        return found

    def _layer(self, index: int, states: Batch, flow: _Flow) -> Measured:
        """Of one layer; moves the calibration text's `states` on to its output."""
        stream, found, routed = self.context.model, Measured([], []), self.context.model.routed(index)
        with ExitStack() as stack:
            layer = stack.enter_context(stream.layer(index))
            key = signature(layer)
            if key not in self._groups:
                probed = probe(stream, index, layer)
                if not probed.experts_are_added:
                    raise stream.unusual("what its experts give goes through something else, which this can't follow")
                self._groups[key] = probed.groups
            groups = self._groups[key]
            recorder = stack.enter_context(_recording(states.ids.numel())) if routed is not None else None
            statistics = _observe(stream, index, layer, groups, states, recorder)
            stored = stream.layer_linears(index)
            storage = self.context.storage(f"{stored[groups[0].linears[0]]}.weight")
            saved = {name: value.clone() for name, value in layer.state_dict().items()}
            seen: ExpertNoise | None = None
            for way, policies in self.ways.items():
                own = {name: policies[full] for name, full in stored.items()}
                if not any(own.values()) and (routed is None or seen is not None):
                    continue
                layer.load_state_dict(saved)
                result = quantize_layer(layer, groups, own, statistics, storage)
                noise = _Noise(result.linears)
                noise.measure(stream, index, layer, flow)
                seen = seen or noise.experts
                for group in result.groups:
                    facts = (way, group.activations, group.alpha)
                    names = [stored[name] for name in group.linears]
                    found.groups.append(Sensitivity(names, *facts, *noise.of(group.linears)))
                    found.linears.extend(Sensitivity([stored[n]], *facts, *noise.of([n])) for n in group.linears)
            if routed is not None and recorder is not None and seen is not None:
                router = saved[routed.router].float() if routed.router else None
                tokens = RoutedTokens(routed, recorder, router, self.expert_tokens)
                experts = seen.measure(self.context, tokens, self.ways)
                found.groups.extend(experts.groups)
                found.linears.extend(experts.linears)
        return found


@dataclass(frozen=True)
class _Flow:
    """What flows through a layer on the text that KL is estimated on.

    Attributes:
        ids: its tokens, int64 [windows, length].
        hidden: what enters it, [windows, length, hidden].
        gradient: by what leaves it, [draws, windows, length, hidden].
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    gradient: torch.Tensor

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        size = _windows(self.hidden.shape[1])
        return zip(self.ids.split(size), self.hidden.split(size), self.gradient.split(size, dim=1), strict=True)


def _windows(length: int) -> int:
    return max(1, _BATCH_TOKENS // length)


def _observe(
    stream: DecoderStream,
    index: int,
    layer: nn.Module,
    groups: list[Group],
    states: Batch,
    recorder: Recorder | None,
) -> dict[str, InputStatistics]:
    """Statistics of every group's input on the calibration text; moves `states` on to the layer's output."""
    routed, stride = stream.routed(index), sample_stride(states.ids.numel())
    experts = recorder.before(routed.handler) if routed is not None and recorder is not None else None
    statistics = {group.linears[0]: InputStatistics(stride=stride, with_hessian=True) for group in groups}
    parts = [*states.split(_windows(states.ids.shape[1]))]
    for part, output in zip(parts, observe(stream, index, layer, parts, statistics, experts), strict=True):
        part.hidden.copy_(output.hidden)
    return statistics


@contextmanager
def _recording(tokens: int) -> Iterator[Recorder]:
    """Takes down what the calibration text sends to a layer's experts, on disk."""
    with (
        tempfile.TemporaryDirectory(prefix="qtool-experts-") as folder,
        Recorder(Path(folder), tokens) as recorder,
    ):
        yield recorder


class _Noise:
    """g·δ of each quantized linear, token by token, on a layer whose float weights are the smoothed ones.

    Attributes:
        experts: what went through the layer's routed experts meanwhile.
    """

    def __init__(self, linears: Mapping[str, QuantizedLinear]) -> None:
        self._linears = linears
        self._weights = {name: linear.dequantize() for name, linear in linears.items()}
        self._tally = Tally()
        self.of = self._tally.of
        self.experts = ExpertNoise()

    def measure(self, stream: DecoderStream, index: int, layer: nn.Module, flow: _Flow) -> None:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [
            layer.get_submodule(name).register_forward_hook(
                lambda _m, args, out, name=name: seen.update({name: (args[0], out)})
            )
            for name in self._linears
        ]
        routed = stream.routed(index)
        for ids, x, g in flow.batches():
            with torch.enable_grad(), replaced(routed) as passages:
                output = stream.run(index, layer, Batch(ids, (x.detach().requires_grad_(),))).hidden
            outputs = [seen[name][1] for name in self._linears]
            noise = {name: self._noise(layer, name, *seen[name]) for name in self._linears}
            found = gradients(routed, passages, output, outputs, g)
            for by_draw in found.by:
                for name, by in zip(self._linears, by_draw, strict=True):
                    self._tally.add(name, (by * noise[name]).sum(dim=-1).flatten())
            if found.by_experts is not None:
                self.experts.runs.append((passages[0].detached(), found.by_experts))
        for handle in handles:
            handle.remove()

    def _noise(self, layer: nn.Module, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        x, output = x.detach(), output.detach()
        rounded = input_quantizer(self._linears[name])(x)
        noise = nn.functional.linear(rounded, self._weights[name], bias_of(layer, name)).sub_(output)
        self._tally.count(name, noise, output)
        return noise
