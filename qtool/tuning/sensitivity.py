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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtool.checkpoint.formats import Format
from qtool.engines.native.stream import DecoderStream
from qtool.errors import QtoolError
from qtool.quant.integer import fake_quantize_tensor, fake_quantize_tokens
from qtool.quant.layer import Storage, quantize_layer
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, bias_of, find_groups, linear_layers, signature
from qtool.quant.types import QuantizedLinear
from qtool.recipe.schema import Policy

if TYPE_CHECKING:
    from qtool.workers import Report

_DRAWS = 2  # tokens drawn per position; each costs a backward pass and steadies the estimate
_ROWS = 4096  # of the output projection, at a time
_BATCH_TOKENS = 2048
_SAMPLE_TOKENS = 512
_PROBE_TOKENS = 8
_HEAD_TOKENS = 1024  # through the output projection, at a time

Policies = Mapping[str, Policy | None]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one linear, or one group of linears that share their input, does when all else is float.

    Attributes:
        linears: full names.
        way: the key of the policies that it was quantized by.
        activations: static or dynamic.
        alpha: the smoothing's exponent; None without smoothing.
        relative_error: squared error of the output over its square.
        kl: the estimated KL divergence of the model's output from the float model's, nats per token.
    """

    linears: list[str]
    way: str
    activations: str
    alpha: float | None
    relative_error: float
    kl: float


@torch.no_grad()
def measure(
    stream: DecoderStream,
    text: torch.Tensor,
    calibration: torch.Tensor,
    ways: Mapping[str, Policies],
    output_format: Format,
    dtype: torch.dtype,
    report: Report,
) -> tuple[list[Sensitivity], list[Sensitivity]]:
    """Every group and every linear, quantized in every way.

    Args:
        stream: the float model, in float32.
        text: int64 [windows, length], to estimate KL on.
        calibration: int64 [samples, length], for the quantizer; another text.
        ways: policies by full linear name, by a name for them.
        output_format: whose scales the quantizer rounds to.
        dtype: of the checkpoint's float tensors.

    Returns:
        (groups, linears), in the model's order, the ways of each together.

    Raises:
        QtoolError: the model's hidden states are not finite.
    """
    torch.manual_seed(0)
    hidden = _forward(stream, text, report)
    gradients = _backward(stream, hidden, report)
    states = stream.prologue(calibration)
    groups: list[Sensitivity] = []
    linears: list[Sensitivity] = []
    topology: dict[Any, list[Group]] = {}
    for index in range(stream.depth):
        report.progress("quantize", index, stream.depth, "layers")
        with stream.layer(index) as layer:
            key = signature(layer)
            if key not in topology:
                topology[key] = _topology(stream, index, layer, states.shape[2])
            prefix = stream.layer_name(index) + "."
            statistics = _observe(stream, index, layer, topology[key], states)
            saved = {name: value.clone() for name, value in layer.state_dict().items()}
            for way, policies in ways.items():
                own = {name: policies[prefix + name] for name in linear_layers(layer)}
                if not any(own.values()):
                    continue
                layer.load_state_dict(saved)
                result = quantize_layer(layer, topology[key], own, statistics, _storage(output_format, dtype))
                noise = _Noise(result.linears)
                noise.measure(stream, index, layer, hidden[index], gradients[index])
                for group in result.groups:
                    facts = (way, group.activations, group.alpha)
                    groups.append(Sensitivity([prefix + n for n in group.linears], *facts, *noise.of(group.linears)))
                    linears += [Sensitivity([prefix + n], *facts, *noise.of([n])) for n in group.linears]
    report.progress("quantize", stream.depth, stream.depth, "layers")
    return groups, linears


def _forward(stream: DecoderStream, text: torch.Tensor, report: Report) -> list[torch.Tensor]:
    """What enters each layer, and what leaves the last: [windows, length, hidden] each."""
    hidden = [stream.prologue(text)]
    for index in range(stream.depth):
        report.progress("forward", index, stream.depth, "layers")
        with stream.layer(index) as layer:
            rows = [stream.run(index, layer, x) for x in hidden[-1].split(_windows(text.shape[1]))]
        hidden.append(torch.cat(rows))
        if not bool(hidden[-1].isfinite().all()):
            raise QtoolError(
                f"the hidden states after {stream.layer_name(index)} are not finite", where=str(stream.checkpoint.path)
            )
    report.progress("forward", stream.depth, stream.depth, "layers")
    return hidden


def _backward(stream: DecoderStream, hidden: list[torch.Tensor], report: Report) -> list[torch.Tensor]:
    """Gradients of log p(drawn tokens) by what leaves each layer: [draws, windows, length, hidden] each."""
    gradient = _head_gradient(stream, hidden[-1], report)
    found = [gradient]
    for index in reversed(range(1, stream.depth)):
        report.progress("backward", stream.depth - 1 - index, stream.depth - 1, "layers")
        with stream.layer(index) as layer:
            pieces = []
            size = _windows(hidden[0].shape[1])
            for x, g in zip(hidden[index].split(size), gradient.split(size, dim=1), strict=True):
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    output = stream.run(index, layer, x)
                pieces.append(torch.stack([_gradients(output, [x], each, i, len(g))[0] for i, each in enumerate(g)]))
            gradient = torch.cat(pieces, dim=1)
        found.append(gradient)
    report.progress("backward", stream.depth - 1, stream.depth - 1, "layers")
    return found[::-1]


def _gradients(
    output: torch.Tensor, by: Sequence[torch.Tensor], gradient: torch.Tensor, number: int, count: int
) -> list[torch.Tensor]:
    found = torch.autograd.grad(output, list(by), gradient, retain_graph=number + 1 < count, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


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
            normalized = stream.normalize(x)
        drawn, normalizer = _draw(stream, normalized.detach())
        total = torch.zeros(_DRAWS, *normalized.shape)
        for first, stop in _slices(stream.vocabulary):
            head = stream.head(first, stop)
            with torch.enable_grad():
                leaf = normalized.detach().requires_grad_()
                logits = stream.logits(leaf, head)
            p = (logits.detach() - normalizer[:, None]).exp()
            for draw in range(_DRAWS):
                wanted = -p
                inside = (drawn[draw] >= first) & (drawn[draw] < stop)
                wanted[inside.nonzero()[:, 0], drawn[draw][inside] - first] += 1
                total[draw] += _gradients(logits, [leaf], wanted, draw, _DRAWS)[0]
        for draw in range(_DRAWS):
            result[draw, tokens] = _gradients(normalized, [x], total[draw], draw, _DRAWS)[0]
    report.progress("head", len(flat), len(flat), "tokens")
    return result.view(_DRAWS, *hidden.shape)


def _draw(stream: DecoderStream, normalized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens drawn from the model's distribution, int64 [draws, tokens]; their normalizer, float32 [tokens])."""
    count = len(normalized)
    best = torch.full((_DRAWS, count), -torch.inf)
    drawn = torch.zeros((_DRAWS, count), dtype=torch.int64)
    sums = []
    for first, stop in _slices(stream.vocabulary):
        logits = stream.logits(normalized, stream.head(first, stop))
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


def _topology(stream: DecoderStream, index: int, layer: nn.Module, width: int) -> list[Group]:
    few = torch.randn(1, _PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    with stream.precision(torch.float32, _PROBE_TOKENS):
        return find_groups(layer, lambda: stream.run(index, layer, few), stream.heads)


def _observe(
    stream: DecoderStream, index: int, layer: nn.Module, groups: Sequence[Group], states: torch.Tensor
) -> dict[str, InputStatistics]:
    """Statistics of every group's input on the calibration text; moves `states` on to the layer's output."""
    stride = max(1, states.shape[0] * states.shape[1] // _SAMPLE_TOKENS)
    statistics = {group.linears[0]: InputStatistics(stride=stride, with_gram=True) for group in groups}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
        for name, seen in statistics.items()
    ]
    for rows in states.split(_windows(states.shape[1])):
        rows.copy_(stream.run(index, layer, rows))
    for handle in handles:
        handle.remove()
    return statistics


def _storage(output_format: Format, dtype: torch.dtype) -> Storage:
    return Storage(
        dtype=dtype,
        weight_scale=lambda scale, static: output_format.storable_weight_scale(
            scale, "static" if static else "dynamic", dtype
        ),
        input_scale=lambda scale: output_format.storable_scale(scale, dtype),
    )


class _Noise:
    """g·δ of each quantized linear, token by token, on a layer whose float weights are the smoothed ones."""

    def __init__(self, linears: Mapping[str, QuantizedLinear]) -> None:
        self._linears = linears
        self._weights = {name: linear.weight * linear.weight_scale[:, None] for name, linear in linears.items()}
        self._products: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
        self._errors = dict.fromkeys(linears, 0.0)
        self._sizes = dict.fromkeys(linears, 0.0)

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
        size = _windows(hidden.shape[1])
        for x, g in zip(hidden.split(size), gradient.split(size, dim=1), strict=True):
            with torch.enable_grad():
                output = stream.run(index, layer, x.detach().requires_grad_())
            outputs = [seen[name][1] for name in self._linears]
            noise = {name: self._noise(layer, name, *seen[name]) for name in self._linears}
            for draw, each in enumerate(g):
                found = _gradients(output, outputs, each, draw, len(g))
                for name, by in zip(self._linears, found, strict=True):
                    self._products[name].append((by * noise[name]).sum(dim=-1).flatten())
        for handle in handles:
            handle.remove()

    def _noise(self, layer: nn.Module, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        linear, x, output = self._linears[name], x.detach(), output.detach()
        if linear.input_scale is None or linear.input_offset is None:
            rounded = fake_quantize_tokens(x)
        else:
            scale, offset = torch.tensor(linear.input_scale), torch.tensor(float(linear.input_offset))
            rounded = fake_quantize_tensor(x, scale, offset)
        noise = nn.functional.linear(rounded, self._weights[name], bias_of(layer, name)).sub_(output)
        self._errors[name] += float(noise.square().sum())
        self._sizes[name] += float(output.square().sum())
        return noise

    def of(self, names: Sequence[str]) -> tuple[float, float]:
        """(relative error, KL per token) of these linears quantized together."""
        products = torch.stack([torch.cat(self._products[name]) for name in names]).sum(dim=0)
        error, size = sum(self._errors[n] for n in names), sum(self._sizes[n] for n in names)
        return error / max(size, 1e-30), float(products.square().mean()) / 2
