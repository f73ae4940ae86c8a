"""Memory, time and disk: what a job will need, said beforehand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qtool.engines.job import CalibrationText
from qtool.errors import InputError
from qtool.quant.group import needs_hessian
from qtool.quant.topology import linear_layers
from qtool.recipe.schema import Policy

if TYPE_CHECKING:
    from qtool.model.decoder import DecoderStream

BATCH_TOKENS = 2048  # that go through a layer at a time, when memory allows
_BASE_BYTES = 500 * 10**6  # this process with torch, transformers and a tokenizer loaded (measured 0.48 to 0.51 GB)
_HEAP_BYTES = 400 * 10**6  # freed, but kept for what comes next (up to 0.43 GB seen)
_TENSOR_BYTES = 1500  # what is kept of every tensor of the checkpoint: header, names, policy
_SCORES_BYTES = 1 << 28
_AHEAD_BYTES = 2 * 10**9  # of statistics that wait for other processes, when memory is not limited
# Estimated and measured, on 2 cores: SmolLM2-135M at 32 x 512 tokens 32 and 35 s, at 128 x 512 90 and 94 s; a dense and
# an expert layer of DeepSeek-R1 at 16 x 512 195 and 193 s; small mixtures 8 and 7, 14 and 17 s.
_BASE_SECONDS = 5.0
_SLOWER = 2.3  # than a plain product of the same number of operations: attention, norms, reads and writes come besides
_CHUNK_BYTES = 5 * 16 * 2**20  # float32 copies of the weights that are quantized at a time
_GPTQ_CHUNK_BYTES = 4 * 64 * 2**20
# What an element of a weight costs beside matrix products, on one thread: to read, round and write it, to search its
# clipping ratio, to search its smoothing scale.
_ROUND_SECONDS, _CLIP_SECONDS, _SMOOTH_SECONDS = 12e-9, 30e-9, 40e-9


@dataclass(frozen=True)
class ResourceEstimate:
    """What a job will need.

    Attributes:
        batch_tokens: how many tokens should go through a layer at a time.
        layers_ahead: how many layers may run while the units of those before them are under way.
        memory_bytes: peak resident set of the process that runs the layers.
        scratch_bytes: on the output's disk while it works, beside the output.
    """

    batch_tokens: int
    layers_ahead: int
    memory_bytes: int
    scratch_bytes: int


def estimate(
    stream: DecoderStream,
    policies: Mapping[str, Policy | None],
    calibration: CalibrationText,
    *,
    exact: bool,
    limit: int | None,
    processes: int = 0,
) -> ResourceEstimate:
    """The largest batch that keeps within `limit` bytes, and then the most layers ahead.

    Args:
        processes: that work on units, besides the one that runs the layers.

    Raises InputError when even one sample at a time does not.
    """
    seq_len, tokens = calibration.seq_len, calibration.samples * calibration.seq_len
    layers = [_Layer(stream, i, policies) for i in range(stream.depth)]
    item = stream.dtype.itemsize
    has_experts = any(layer.experts for layer in layers)
    scratch = tokens * stream.hidden_size * (2 * item + has_experts * (item + 4))
    # Where query and value heads differ in size, as in DeepSeek's, torch computes attention with all scores at once, in
    # float32 and twice.
    scores = stream.heads * seq_len * 8
    batch = max(seq_len, min(BATCH_TOKENS, _SCORES_BYTES // scores))
    while True:
        needed = _BASE_BYTES + _HEAP_BYTES + _TENSOR_BYTES * len(stream.checkpoint.names)
        together = min(batch, tokens)
        needed += max(layer.bytes(tokens, together, item, scores, exact=exact) for layer in layers)
        if limit is None or needed <= limit:
            spare = _AHEAD_BYTES if limit is None else limit - needed
            each = max(layer.statistics_bytes for layer in layers)
            ahead = min(processes, len(layers), spare // max(1, each))
            return ResourceEstimate(
                batch, ahead, needed + ahead * each, scratch + ahead * tokens * stream.hidden_size * item
            )
        if batch <= seq_len:
            raise InputError(
                f"this model needs {needed / 1e9:.2f} GB, {limit / 1e9:.2f} GB are allowed",
                where="--memory",
                hint="allow more, or make the samples shorter (--seq-len)",
            )
        batch = max(seq_len, batch // 2)


def seconds(stream: DecoderStream, policies: Mapping[str, Policy | None], calibration: CalibrationText) -> float:
    """Estimated time of a job on this machine, from the sizes of the model and a short timing.

    Work per layer: one forward pass over the calibration tokens, the Gram matrices of the inputs that want them
    (about as much again), GPTQ, and work on every element of the weights.
    """
    tokens = calibration.samples * calibration.seq_len
    rate = _flops(stream.dtype, stream.device)
    products = elements = 0.0
    for index in range(stream.depth):
        layer = _Layer(stream, index, policies)
        products += layer.products(tokens)
        elements += layer.element_seconds()
    return round(_BASE_SECONDS + _SLOWER * products / rate + elements / torch.get_num_threads(), 1)


class _Layer:
    """The sizes of one decoder layer, from its skeleton."""

    def __init__(self, stream: DecoderStream, index: int, policies: Mapping[str, Policy | None]) -> None:
        layer = stream.skeleton_layer(index)
        self.linears: list[tuple[int, int, Policy | None]] = []
        for name, linear in linear_layers(layer).items():
            stored = stream.stored(index, f"{name}.weight").removesuffix(".weight")
            self.linears.append((linear.out_features, linear.in_features, policies.get(stored)))
        self.parameters = sum(p.numel() for p in layer.parameters())
        self.experts: list[tuple[int, int, Policy | None]] = []
        self.share = 0.0
        routed = stream.routed(index)
        if routed is not None:
            for expert in routed.names:
                for name in expert:
                    out, width = stream.checkpoint.info(f"{name}.weight").shape
                    self.experts.append((out, width, policies.get(name)))
            self.share = stream.experts_per_token / len(routed.names)

    @property
    def statistics_bytes(self) -> int:
        """What is known of the inputs of all linears that are not experts'."""
        by_gptq = {width for _, width, policy in self.linears if policy and needs_hessian(policy)}
        return 4 * sum(width**2 for width in by_gptq) + 4 * 512 * sum({width for _, width, _ in self.linears})

    def bytes(self, tokens: int, batch: int, item: int, scores: int, *, exact: bool) -> int:
        """Peak memory on top of what the process has anyway; `scores` is what attention takes for a token."""
        everything = [*self.linears, *self.experts]
        widest = max((width for _, width, _ in everything), default=0)
        longest = max((out for out, _, _ in everything), default=0)
        by_gptq = [width for _, width, policy in everything if policy and needs_hessian(policy)]
        statistics = 4 * sum({width: width**2 for width in by_gptq}.values()) + 4 * 512 * widest * 6
        running = self.parameters * item + batch * (item * (3 * longest + 4 * widest) + scores) + statistics
        probing = 4 * self.parameters
        chunk = _GPTQ_CHUNK_BYTES if by_gptq else _CHUNK_BYTES
        group = max((out * width for out, width, _ in everything), default=0)
        chunk = min(chunk, 5 * 4 * 3 * group)
        quantizing = statistics + chunk + 4 * 4 * max(by_gptq, default=0) ** 2 + 2 * group
        quantizing += 2 * 4 * min(group, 1 << 24)  # rows that the search for a smoothing scale looks at
        loading = 3 * (1 + item) * max((out * width for out, width, _ in self.experts), default=0)
        if exact:
            both = sum(out + width for out, width, _ in self.linears)
            running += 12 * self.parameters + 2 * 4 * tokens * both
        return max(running, probing, quantizing + loading)

    def products(self, tokens: int) -> float:
        """Multiplications and additions of matrix products."""
        total = 0.0
        for linears, share in ((self.linears, 1.0), (self.experts, self.share)):
            for out, width, policy in linears:
                total += 2 * out * width * tokens * share
                if policy is not None and needs_hessian(policy):
                    # the Hessian (of about every third linear: the others share an input), and GPTQ,
                    # in float32 and in small steps
                    total += (2 * width**2 * min(tokens, 4 * 512) + 4 * width**3) / 3 + 4 * 2 * out * width**2
        return total

    def element_seconds(self) -> float:
        total = 0.0
        for out, width, policy in (*self.linears, *self.experts):
            if policy is not None:
                each = (
                    _ROUND_SECONDS + _CLIP_SECONDS * policy.clip + _SMOOTH_SECONDS * (policy.smoothing.method == "osl")
                )
                total += out * width * each
        return total


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    a = torch.randn(512, 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    a @ b
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 0.2:
        float((a @ b)[0, 0])
        count += 1
    return count * 2 * 512 * 1024 * 1024 / (time.perf_counter() - begin)
