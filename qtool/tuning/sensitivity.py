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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtool.checkpoint.formats import QuantizedFormat
from qtool.engines.native.context import storage
from qtool.model.activations import Activations
from qtool.model.decoder import DecoderStream
from qtool.model.loader import input_quantizer
from qtool.model.observe import forward, observe, sample_stride
from qtool.model.probe import probe
from qtool.model.recorder import Recorder
from qtool.quant.layer import quantize_layer
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, bias_of, linear_layers, signature
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy
from qtool.tuning.experts import ExpertNoise, gradients, replaced
from qtool.tuning.noise import Sensitivity, Tally

if TYPE_CHECKING:
    from qtool.workers import Report

_DRAWS = 2  # tokens drawn per position; each costs a backward pass and steadies the estimate
_ROWS = 4096  # of the output projection, at a time
_BATCH_TOKENS = 2048
_HEAD_TOKENS = 1024  # through the output projection, at a time

Policies = Mapping[str, Policy | None]


@torch.no_grad()
def measure(
    stream: DecoderStream,
    text: torch.Tensor,
    calibration: torch.Tensor,
    ways: Mapping[str, Policies],
    output_format: QuantizedFormat,
    dtype: torch.dtype,
    expert_tokens: int,
    report: Report,
) -> tuple[list[Sensitivity], list[Sensitivity]]:
    """Every group and every linear, quantized in every way.

    Args:
        stream: the float model, in float32.
        text: int64 [windows, length], to estimate KL on.
        calibration: int64 [samples, length], for the quantizer; another text.
        ways: policies by the checkpoint's linear names, by a name for them.
        output_format: of the quantized model.
        dtype: of the checkpoint's float tensors.
        expert_tokens: how many calibration tokens an expert's statistics need.

    Returns:
        (groups, linears), in the model's order, the ways of each together. All routed experts of a layer are one
        group: runtimes run them as one.

    Raises:
        QtoolError: the model's hidden states are not finite.
    """
    torch.manual_seed(0)
    hidden = [states.clone() for states in forward(stream, text, _BATCH_TOKENS, "forward", report)]
    gradients_of = _backward(stream, hidden, report)
    states = stream.prologue(calibration)
    groups: list[Sensitivity] = []
    linears: list[Sensitivity] = []
    topology: dict[Any, list[Group]] = {}
    for index in range(stream.depth):
        report.progress("quantize", index, stream.depth, "layers")
        routed = stream.routed(index)
        with ExitStack() as stack:
            layer = stack.enter_context(stream.layer(index))
            key = signature(layer)
            if key not in topology:
                topology[key] = probe(stream, index, layer)
            stored = {
                name: stream.stored(index, f"{name}.weight").removesuffix(".weight") for name in linear_layers(layer)
            }
            recorder = stack.enter_context(_recording(states)) if routed is not None else None
            experts = recorder.before(routed.handler) if routed is not None and recorder is not None else None
            stride = sample_stride(states[..., 0].numel())
            statistics = {g.linears[0]: InputStatistics(stride=stride, with_hessian=True) for g in topology[key]}
            parts = states.split(_windows(states.shape[1]))
            for part, output in zip(parts, observe(stream, index, layer, parts, statistics, experts), strict=True):
                part.copy_(output)
            saved = {name: value.clone() for name, value in layer.state_dict().items()}
            seen: ExpertNoise | None = None
            for way, policies in ways.items():
                own = {name: policies[full] for name, full in stored.items()}
                if not any(own.values()) and (routed is None or seen is not None):
                    continue
                layer.load_state_dict(saved)
                result = quantize_layer(layer, topology[key], own, statistics, storage(output_format, dtype))
                noise = _Noise(result.linears)
                noise.measure(stream, index, layer, hidden[index], gradients_of[index])
                seen = seen or noise.experts
                for group in result.groups:
                    facts = (way, group.activations, group.alpha)
                    names = [stored[name] for name in group.linears]
                    groups.append(Sensitivity(names, *facts, *noise.of(group.linears)))
                    linears += [Sensitivity([stored[n]], *facts, *noise.of([n])) for n in group.linears]
            if routed is not None and recorder is not None and seen is not None:
                router = saved[routed.router].float() if routed.router else None
                together, each = seen.measure(stream, routed, recorder, router, ways, output_format, expert_tokens)
                groups += together
                linears += each
    report.progress("quantize", stream.depth, stream.depth, "layers")
    return groups, linears


def _backward(stream: DecoderStream, hidden: list[torch.Tensor], report: Report) -> list[torch.Tensor]:
    """Gradients of log p(drawn tokens) by what leaves each layer: [draws, windows, length, hidden] each."""
    gradient = _head_gradient(stream, hidden[-1], report)
    entering = [gradient]
    for index in reversed(range(1, stream.depth)):
        report.progress("backward", stream.depth - 1 - index, stream.depth - 1, "layers")
        with stream.layer(index) as layer:
            pieces = []
            size, routed = _windows(hidden[0].shape[1]), stream.routed(index)
            for x, g in zip(hidden[index].split(size), gradient.split(size, dim=1), strict=True):
                with torch.enable_grad(), replaced(routed) as passages:
                    x = x.detach().requires_grad_()
                    output = stream.run(index, layer, x)
                found, _ = gradients(stream, routed, passages, output, [x], g)
                pieces.append(torch.stack([by_draw[0] for by_draw in found]))
            gradient = torch.cat(pieces, dim=1)
        entering.append(gradient)
    report.progress("backward", stream.depth - 1, stream.depth - 1, "layers")
    return entering[::-1]


def _head_gradient(stream: DecoderStream, hidden: torch.Tensor, report: Report) -> torch.Tensor:
    """Gradient of log p(y) by what leaves the last layer, y drawn from p, a slice of the vocabulary at a time.

    By the logits it is onehot(y) - p; y is drawn as the largest logit plus Gumbel noise, which needs no p.
    """
    flat = hidden.reshape(-1, hidden.shape[2])
    result = torch.zeros(_DRAWS, *flat.shape)
    for start in range(0, len(flat), _HEAD_TOKENS):
        report.progress("head", start, len(flat), "tokens")
        tokens = slice(start, start + _HEAD_TOKENS)
        with torch.enable_grad():
            x = flat[tokens].detach().requires_grad_()
            normalized = stream.head.normalize(x)
        drawn, normalizer = _draw(stream, normalized.detach())
        total = torch.zeros(_DRAWS, *normalized.shape)
        for first, stop in _slices(stream.head.vocabulary):
            rows = stream.head.rows(first, stop)
            with torch.enable_grad():
                leaf = normalized.detach().requires_grad_()
                logits = stream.head.logits(leaf, rows)
            p = (logits.detach() - normalizer[:, None]).exp()
            for draw in range(_DRAWS):
                wanted = -p
                inside = (drawn[draw] >= first) & (drawn[draw] < stop)
                wanted[inside.nonzero()[:, 0], drawn[draw][inside] - first] += 1
                total[draw] += _gradient(logits, leaf, wanted, draw)
        for draw in range(_DRAWS):
            result[draw, tokens] = _gradient(normalized, x, total[draw], draw)
    report.progress("head", len(flat), len(flat), "tokens")
    return result.view(_DRAWS, *hidden.shape)


def _gradient(output: torch.Tensor, by: torch.Tensor, seed: torch.Tensor, draw: int) -> torch.Tensor:
    """The gradient by one tensor, for one of the draws."""
    return torch.autograd.grad(output, by, seed, retain_graph=draw + 1 < _DRAWS)[0]


def _draw(stream: DecoderStream, normalized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens drawn from the model's distribution, int64 [draws, tokens]; their normalizer, float32 [tokens])."""
    count = len(normalized)
    best = torch.full((_DRAWS, count), -torch.inf)
    drawn = torch.zeros((_DRAWS, count), dtype=torch.int64)
    sums = []
    for first, stop in _slices(stream.head.vocabulary):
        logits = stream.head.logits(normalized, stream.head.rows(first, stop))
        sums.append(logits.logsumexp(dim=1))
        for draw in range(_DRAWS):
            gumbel = -torch.empty_like(logits).exponential_().log_()
            largest, place = (logits + gumbel).max(dim=1)
            drawn[draw] = torch.where(largest > best[draw], place + first, drawn[draw])
            best[draw] = torch.maximum(best[draw], largest)
    return drawn, torch.stack(sums).logsumexp(dim=0)


def _slices(vocabulary: int) -> Iterator[tuple[int, int]]:
    for first in range(0, vocabulary, _ROWS):
        yield first, min(first + _ROWS, vocabulary)


def _windows(length: int) -> int:
    return max(1, _BATCH_TOKENS // length)


@contextmanager
def _recording(states: torch.Tensor) -> Iterator[Recorder]:
    """Takes down what the calibration text sends to a layer's experts, on disk."""
    with (
        tempfile.TemporaryDirectory(prefix="qtool-experts-") as folder,
        Activations(Path(folder) / "like", states[..., 0].numel(), states.shape[2], states.dtype) as like,
        Recorder(Path(folder), like) as recorder,
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

    def measure(
        self, stream: DecoderStream, index: int, layer: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [
            layer.get_submodule(name).register_forward_hook(
                lambda _m, args, out, name=name: seen.update({name: (args[0], out)})
            )
            for name in self._linears
        ]
        size, routed = _windows(hidden.shape[1]), stream.routed(index)
        for x, g in zip(hidden.split(size), gradient.split(size, dim=1), strict=True):
            with torch.enable_grad(), replaced(routed) as passages:
                output = stream.run(index, layer, x.detach().requires_grad_())
            outputs = [seen[name][1] for name in self._linears]
            noise = {name: self._noise(layer, name, *seen[name]) for name in self._linears}
            found, by_experts = gradients(stream, routed, passages, output, outputs, g)
            for by_draw in found:
                for name, by in zip(self._linears, by_draw, strict=True):
                    self._tally.add(name, (by * noise[name]).sum(dim=-1).flatten())
            if by_experts is not None:
                self.experts.runs.append((passages[0].detached(), by_experts))
        for handle in handles:
            handle.remove()

    def _noise(self, layer: nn.Module, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        x, output = x.detach(), output.detach()
        rounded = input_quantizer(self._linears[name])(x)
        noise = nn.functional.linear(rounded, self._weights[name], bias_of(layer, name)).sub_(output)
        self._tally.count(name, noise, output)
        return noise
