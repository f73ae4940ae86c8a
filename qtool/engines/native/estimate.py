"""Memory, time and disk: what a job will need, said beforehand."""

from __future__ import annotations

import math
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
_TIMED_SECONDS, _MOST_ROWS = 0.5, 4096  # of each timing; of the matrix that it takes
_SLOWER = 2.3  # than a plain product of the same number of operations: attention, norms, reads and writes come besides
_CHUNK_BYTES = 5 * 16 * 2**20  # float32 copies of the weights that are quantized at a time
_GPTQ_CHUNK_BYTES = 4 * 64 * 2**20
# What an element of a weight costs beside matrix products, on one thread: to read, round and write it, to search its
# clipping ratio, to search its smoothing scale.
_ROUND_SECONDS, _CLIP_SECONDS, _SMOOTH_SECONDS = 12e-9, 30e-9, 40e-9
# With gradients: what a logit costs, to draw a token, and a number that a linear gives, to square its gradient.
# (SmolLM2-135M, on an Intel Xeon with AMX: 39 ns of a logit with its products.)
_LOGIT_SECONDS, _SQUARE_SECONDS = 35e-9, 10e-9


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
    model: DecoderStream,
    policies: Mapping[str, Policy | None],
    calibration: CalibrationText,
    *,
    exact: bool,
    gradients: bool = False,
    limit: int | None,
    processes: int = 0,
) -> ResourceEstimate:
    """The largest batch that keeps within `limit` bytes, and then the most layers ahead.

    Args:
        gradients: are taken through all layers (effort: high).
        processes: that work on units, besides the one that runs the layers.

    Raises InputError when even one sample at a time does not.
    """
    seq_len, tokens = calibration.seq_len, calibration.samples * calibration.seq_len
    layers = [_LayerSizes.of(model, index, policies) for index in range(model.depth)]
    states = _state_bytes(model, seq_len)
    # Where query and value heads differ in size, as in DeepSeek's, torch computes attention with all scores at once, in
    # float32 and twice.
    scores = model.heads * seq_len * 8
    batch = max(seq_len, min(BATCH_TOKENS, _SCORES_BYTES // scores))
    while True:
        together, item = min(batch, tokens), model.dtype.itemsize
        further = max(0, states - model.hidden_size * item)  # besides hidden states, of a token
        needed = 4 * together * further + _BASE_BYTES + _HEAP_BYTES + _TENSOR_BYTES * len(model.checkpoint.names)
        needed += max(
            max(
                layer.running_bytes(together, item, scores) + (layer.exact_bytes(tokens) if exact else 0),
                layer.probing_bytes,
                layer.quantizing_bytes(item),
            )
            for layer in layers
        )
        if limit is None or needed <= limit:
            break
        if batch <= seq_len:
            raise InputError(
                f"this model needs {needed / 1e9:.2f} GB, {limit / 1e9:.2f} GB are allowed",
                where="--memory",
                hint="allow more, or make the samples shorter (--seq-len)",
            )
        batch = max(seq_len, batch // 2)
    spare = _AHEAD_BYTES if limit is None else limit - needed
    each = max(layer.waiting_bytes for layer in layers)
    ahead = min(processes, len(layers), spare // max(1, each))
    has_experts = any(layer.experts for layer in layers)
    scratch = tokens * (2 + ahead) * states + tokens * model.hidden_size * has_experts * (item + 4)
    if gradients:  # what enters every layer, and the gradient
        scratch = max(scratch, tokens * (len(layers) + 2) * states)
    return ResourceEstimate(batch, ahead, needed + ahead * each, scratch)


def seconds(
    model: DecoderStream,
    policies: Mapping[str, Policy | None],
    calibration: CalibrationText,
    *,
    gradients: bool = False,
) -> float:
    """Estimated time of a job on this machine, from the sizes of the model and a short timing.

    Work per layer: one forward pass over the calibration tokens, the Hessians of the inputs that want them (about as
    much again), GPTQ, and work on every element of the weights.
    """
    tokens = calibration.samples * calibration.seq_len
    layers = [_LayerSizes.of(model, index, policies) for index in range(model.depth)]
    matrices = [each for layer in layers for each in layer.all]
    widest = max(matrices, key=lambda each: each.elements, default=_Matrix(1024, 1024, None))
    begin, worked = time.perf_counter(), time.thread_time()
    # The forward pass computes in the model's dtype, GPTQ and its Hessians in float32. On processors with instructions
    # for 16-bit floats the one is many times as fast as the other, on those without several times as slow.
    running = sum(each.running_products(tokens) for each in matrices)
    elements = sum(layer.element_seconds for layer in layers)
    if gradients:  # once more forward; again, and back; and the head likewise, after a pass that draws tokens
        running *= 4
        running += 6 * model.head.vocabulary * model.hidden_size * tokens
        outputs = sum(each.out * each.share for each in matrices)
        elements += tokens * (_LOGIT_SECONDS * model.head.vocabulary + _SQUARE_SECONDS * outputs)
    running /= _flops(model.dtype, model.device, widest)
    compensating = sum(each.compensating_products(tokens) for each in matrices)
    compensating /= _flops(torch.float32, model.device, widest)
    fixed = _BASE_SECONDS + elements / torch.get_num_threads()
    if model.device.type == "cpu":  # where others compute, too, this process has only some of the time
        fixed *= max(1.0, (time.perf_counter() - begin) / max(time.thread_time() - worked, 1e-3))
    return round(fixed + _SLOWER * (running + compensating), 1)


def _state_bytes(model: DecoderStream, length: int) -> int:
    """The most that passes from one layer to the next, per token."""
    layouts = [model.entering(index, length) for index in range(model.depth + 1)]
    return max(sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout) for layout in layouts) // length


@dataclass(frozen=True)
class _Matrix:
    """A linear's weight [out, width], and what becomes of it.

    Attributes:
        share: of the tokens that it sees.
    """

    out: int
    width: int
    policy: Policy | None
    share: float = 1.0

    @property
    def elements(self) -> int:
        return self.out * self.width

    @property
    def is_compensated(self) -> bool:
        return self.policy is not None and needs_hessian(self.policy)

    def running_products(self, tokens: int) -> float:
        """Multiplications and additions of the matrix product that it is."""
        return 2 * self.elements * tokens * self.share

    def compensating_products(self, tokens: int) -> float:
        """Those of GPTQ, in small steps, and of the Hessian: of about every third linear, the others share an input."""
        if not self.is_compensated:
            return 0.0
        hessian = (2 * self.width**2 * min(tokens, 4 * 512) + 4 * self.width**3) / 3
        return hessian + 4 * 2 * self.out * self.width**2

    @property
    def element_seconds(self) -> float:
        if self.policy is None:
            return 0.0
        searched = self.policy.smoothing.method == "osl"
        return self.elements * (_ROUND_SECONDS + _CLIP_SECONDS * self.policy.clip + _SMOOTH_SECONDS * searched)


@dataclass(frozen=True)
class _LayerSizes:
    """The sizes of one decoder layer, from its skeleton, and memory on top of what the process has anyway.

    Attributes:
        linears: without routed experts.
        experts: those of the routed experts.
        parameters: elements of all weights but the experts'.
    """

    linears: list[_Matrix]
    experts: list[_Matrix]
    parameters: int

    @classmethod
    def of(cls, model: DecoderStream, index: int, policies: Mapping[str, Policy | None]) -> _LayerSizes:
        layer, routed = model.skeleton_layer(index), model.routed(index)
        linears = []
        for name, linear in linear_layers(layer).items():
            stored = model.stored(index, f"{name}.weight").removesuffix(".weight")
            linears.append(_Matrix(linear.out_features, linear.in_features, policies.get(stored)))
        experts = []
        if routed is not None:
            share = model.experts_per_token / len(routed.names)
            for name in (name for expert in routed.names for name in expert):
                out, width = model.weights.shape(f"{name}.weight")
                experts.append(_Matrix(out, width, policies.get(name), share))
        return cls(linears, experts, sum(p.numel() for p in layer.parameters()))

    @property
    def all(self) -> list[_Matrix]:
        return [*self.linears, *self.experts]

    @property
    def waiting_bytes(self) -> int:
        """What is known of the inputs of all linears that are not experts', while their unit is under way."""
        by_gptq = {each.width for each in self.linears if each.is_compensated}
        return 4 * sum(width**2 for width in by_gptq) + 4 * 512 * sum({each.width for each in self.linears})

    @property
    def _statistics_bytes(self) -> int:
        by_gptq = {each.width for each in self.all if each.is_compensated}
        widest = max((each.width for each in self.all), default=0)
        return 4 * sum(width**2 for width in by_gptq) + 4 * 512 * widest * 6

    def running_bytes(self, batch: int, item: int, scores: int) -> int:
        """While it is run and observed.

        Args:
            batch: tokens at a time.
            item: bytes of a number.
            scores: bytes that attention takes for a token.
        """
        longest = max((each.out for each in self.all), default=0)
        widest = max((each.width for each in self.all), default=0)
        activations = batch * (item * (3 * longest + 4 * widest) + scores)
        return self.parameters * item + activations + self._statistics_bytes

    def exact_bytes(self, tokens: int) -> int:
        """What osl: exact takes besides: the layer several times in float32, and every linear's input and output."""
        return 12 * self.parameters + 2 * 4 * tokens * sum(each.out + each.width for each in self.linears)

    @property
    def probing_bytes(self) -> int:
        """While its groups are found, in float32."""
        return 4 * self.parameters

    def quantizing_bytes(self, item: int) -> int:
        """While its linears, or one of its experts, are quantized."""
        by_gptq = [each.width for each in self.all if each.is_compensated]
        largest = max((each.elements for each in self.all), default=0)
        chunk = min(_GPTQ_CHUNK_BYTES if by_gptq else _CHUNK_BYTES, 5 * 4 * 3 * largest)
        needed = self._statistics_bytes + chunk + 4 * 4 * max(by_gptq, default=0) ** 2 + 2 * largest
        needed += 2 * 4 * min(largest, 1 << 24)  # rows that the search for a smoothing scale looks at
        return needed + 3 * (1 + item) * max((each.elements for each in self.experts), default=0)

    @property
    def element_seconds(self) -> float:
        return sum(each.element_seconds for each in self.all)


def _flops(dtype: torch.dtype, device: torch.device, like: _Matrix) -> float:
    """Multiplications and additions a second that this machine does now, in products with a matrix of this size."""
    out, width = min(like.out, _MOST_ROWS), min(like.width, _MOST_ROWS)
    a = torch.randn(512, width, device=device).to(dtype)
    b = torch.randn(width, out, device=device).to(dtype)
    a @ b
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _TIMED_SECONDS:
        float((a @ b)[0, 0])
        count += 1
    return count * 2 * 512 * width * out / (time.perf_counter() - begin)
