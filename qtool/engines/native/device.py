"""Where to compute, in which type, and how much at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qtool.errors import InputError, QtoolError
from qtool.quant.group import needs_hessian
from qtool.quant.rounding import graphs
from qtool.quant.topology import linear_layers
from qtool.recipe.schema import Policy

if TYPE_CHECKING:
    from qtool.engines.job import CalibrationText
    from qtool.model.decoder import DecoderStream

ELEMENTS = 1 << 27  # of a weight that are rounded at a time on a device: its steps cost the same for any number of rows
_LEAST_ELEMENTS = 1 << 22
_BASE_BYTES = 1 << 30  # of a device: its libraries, and what the allocator can't give out again
_GROUPS = 3  # of linears that share an input, of one width, at most: q, k, v; o; gate and up
_COPIES = 3  # of the largest Hessian, besides itself, while it is factorized
_CHUNK_BYTES = 24  # of an element while it is rounded: the weight, its reordered copy, integers, trials of scales

T = TypeVar("T")


def choose(wanted: str, *, exact: bool) -> str:
    """`auto` takes an accelerator that torch can use.

    osl: exact takes main memory, the only place that it has its integer products for.

    Raises InputError when torch can't use that device, or the job can't.
    """
    if exact:
        if wanted not in ("auto", "cpu"):
            raise InputError(
                f"osl: exact can't use {wanted}", where="--device", hint="use --device cpu, or osl: fast in the recipe"
            )
        return "cpu"
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "npu": hasattr(torch, "npu") and torch.npu.is_available()}
    if wanted == "auto":
        return next(name for name in ("npu", "cuda", "cpu") if usable[name])
    if not usable[wanted]:
        raise InputError(f"torch can't use {wanted} here", where="--device", hint="use --device cpu")
    return wanted


def compute_dtype(device: str, *, exact: bool) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32; osl: exact is float32.

    CUDA cards multiply bfloat16 from compute capability 8.0 on (Ampere), NPUs from the 910B on. Older ones would
    imitate it slowly or refuse it: they get float32. float16 overflows on the outliers of large models.
    """
    if exact:
        return torch.float32
    if device == "cuda":
        fast = all(torch.cuda.get_device_capability(card) >= (8, 0) for card in range(torch.cuda.device_count()))
    elif device == "npu":
        fast = bool(_module(device).is_bf16_supported())
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def reduced_precision() -> str | None:
    """What makes products of float32 matrices less precise here than they say, and so the results: TF32, if it is on.

    qtool leaves it off, as torch does.
    """
    matmul = torch.backends.cuda.matmul
    if torch.cuda.is_available() and (matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"):
        return "TF32 is on: products of float32 matrices are rounded to 10 bits, and quantized weights differ for it"
    return None


# ---------------------------------------------------------------- cards


def check_cards(device: str, cards: int | None) -> None:
    """Raises InputError when there aren't so many cards."""
    if cards is None or cards == 1:
        return
    if device == "cpu":
        raise InputError("cards are asked for, and this job runs on the CPU", where="--devices", hint="use --workers")
    there = _module(device).device_count()
    if cards > there:
        raise InputError(f"{cards} cards are asked for, {there} are there", where="--devices", hint="use fewer")


def use(device: str, card: int) -> None:
    """This process computes on this card from here on."""
    _module(device).set_device(card)


def limit(device: str, memory: int | None) -> None:
    """Let torch take no more of the device's memory than so many bytes."""
    if memory is not None and device != "cpu":
        total = _module(device).mem_get_info()[1]
        _module(device).set_per_process_memory_fraction(min(1.0, memory / total))


def free_bytes(device: str, memory: int | None) -> int | None:
    """What this process can take of the device's memory, at most `memory`; None in main memory."""
    if device == "cpu":
        return None
    free = int(_module(device).mem_get_info()[0])
    return free if memory is None else min(free, memory)


def _module(device: str) -> Any:
    return getattr(torch, device)


# ---------------------------------------------------------------- how much at a time


@dataclass(frozen=True)
class DevicePlan:
    """What goes to a device at a time, and what stays there.

    Attributes:
        batch_tokens: that go through a layer at a time.
        elements: of a weight that are rounded at a time.
        keeps_weights: a layer's weights stay from its run to their rounding; else they are read twice.
        keeps_tokens: what enters and leaves a layer's experts stays; else it goes through files.
        needed: bytes, at most.
    """

    batch_tokens: int
    elements: int = ELEMENTS
    keeps_weights: bool = True
    keeps_tokens: bool = True
    needed: int = 0


def plan(
    model: DecoderStream,
    policies: Mapping[str, Policy | None],
    calibration: CalibrationText,
    batch_tokens: int,
    free: int,
) -> DevicePlan:
    """The fastest way that keeps within `free` bytes; where none does, the smallest."""
    layers = [_Layer.of(model, index, policies) for index in range(model.depth)]
    tokens, item = calibration.samples * calibration.seq_len, model.dtype.itemsize
    batches, most = [batch_tokens], min(batch_tokens, tokens)
    while batches[-1] // 2 >= calibration.seq_len:
        batches.append(batches[-1] // 2)
    chunks = [ELEMENTS >> i for i in range(int(math.log2(ELEMENTS // _LEAST_ELEMENTS)) + 1)]
    found = DevicePlan(most)
    for keeps_weights, keeps_tokens in ((True, True), (True, False), (False, False)):
        for batch, elements in [*((batches[0], chunk) for chunk in chunks), *((b, chunks[-1]) for b in batches[1:])]:
            needed = _BASE_BYTES + max(
                layer.needed(batch, elements, item, tokens * keeps_tokens, keeps_weights, model.hidden_size)
                for layer in layers
            )
            found = DevicePlan(batch, elements, keeps_weights, keeps_tokens, needed)
            if needed <= free:
                return found
    return found


@dataclass(frozen=True)
class _Layer:
    """Sizes of a decoder layer.

    Attributes:
        parameters: without routed experts.
        widest: channels that enter or leave a linear, at most.
        hessians: elements of all Hessians.
        largest: of them, elements.
        weight: elements of the weights that are rounded together, at most.
        expert: elements of a routed expert; 0 without.
    """

    parameters: int
    widest: int
    hessians: int
    largest: int
    weight: int
    expert: int

    @classmethod
    def of(cls, model: DecoderStream, index: int, policies: Mapping[str, Policy | None]) -> _Layer:
        layer, routed = model.skeleton_layer(index), model.routed(index)
        wanted, widest, weight = dict[int, int](), 1, 1
        for name, linear in linear_layers(layer).items():
            policy = policies.get(model.stored(index, f"{name}.weight").removesuffix(".weight"))
            widest = max(widest, linear.in_features, linear.out_features)
            weight = max(weight, 2 * linear.in_features * linear.out_features)
            if policy is not None and needs_hessian(policy):
                wanted[linear.in_features] = min(_GROUPS, wanted.get(linear.in_features, 0) + 1)
        hessians = sum(width**2 * count for width, count in wanted.items())
        largest, expert = max((width**2 for width in wanted), default=0), 0
        if routed is not None:
            shapes = [model.weights.shape(f"{name}.weight") for name in routed.names[0]]
            expert = sum(math.prod(shape) for shape in shapes)
            largest = max(largest, max(shape[1] ** 2 for shape in shapes))
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        return cls(parameters, widest, hessians, largest, weight, expert)

    def needed(self, batch: int, elements: int, item: int, kept_tokens: int, keeps_weights: bool, hidden: int) -> int:
        """Bytes while it runs, or is rounded, whichever is more."""
        statistics = 4 * self.hessians
        kept = kept_tokens * hidden * (item + 4) if self.expert else 0
        weights = self.parameters * item
        running = weights + batch * item * 8 * self.widest
        chunk = _CHUNK_BYTES * min(elements, max(self.weight, self.expert)) + 2 * self.weight
        rounding = weights * keeps_weights + max(_COPIES * 4 * self.largest, chunk + 4 * self.largest)
        return statistics + kept + max(running, rounding) + self.expert * (item + 4)


class Room:
    """How much goes to a device at a time: half as much from when its memory has run out.

    Args:
        size: at first.
        least: to go down to.
        tell: hears the new size.
    """

    def __init__(self, size: int, least: int, tell: Callable[[int], None]) -> None:
        self.size = size
        self._least, self._tell = least, tell

    def fit(self, work: Callable[[int], T]) -> T:
        """What `work` gives for the size, which it may be asked for several times.

        Raises QtoolError when even the least is too much.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if self.size // 2 < self._least:
                    raise QtoolError(
                        "the device's memory has run out",
                        where="--device",
                        hint="free some of it, use a larger card or shorter samples (--seq-len), or --device cpu",
                    ) from None
            # Here nothing of what failed is alive any more.
            self.size //= 2
            graphs.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._tell(self.size)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
