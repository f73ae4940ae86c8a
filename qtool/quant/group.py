"""One group of linears from float to integers: activation ranges, clipping, rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qtool.quant import observers
from qtool.quant.integer import InputQuantizer, asymmetric_parameters, storage_dtype, widened
from qtool.quant.report import GroupReport, extent, extremes, report
from qtool.quant.rounding.clipping import Scales, ScaleSearch
from qtool.quant.rounding.errors import ErrorByEnergy
from qtool.quant.rounding.gptq import GPTQ
from qtool.quant.rounding.nearest import round_to_nearest
from qtool.quant.rounding.refinement import Refinement
from qtool.quant.statistics import InputStatistics, Smoothed
from qtool.quant.topology import Group
from qtool.quant.transforms import Diagonal, Folded, transform_of
from qtool.quant.types import QuantizedLinear, dequantize
from qtool.quant.weights import Rows, chunks
from qtool.recipe.policy import Policy
from qtool.scheme import Scheme
from qtool.transfers import Download

_CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8)
# Weights that are in float32 at a time: what the cache takes; GPTQ needs more rows to be worth its steps.
_CHUNK, _GPTQ_CHUNK = 1 << 22, 1 << 24
# Bits from which on it is worth nothing to ask what GPTQ leaves of an error when scales are chosen, or which end of the
# range has one number more.
_FINE = 8
_REPORT_TOKENS = 32  # that the reported error of a group is measured on


@dataclass(frozen=True)
class Storage:
    """What a checkpoint format keeps of the numbers, so that integers fit what the runtime will compute with.

    Attributes:
        dtype: of the model's float tensors.
        weight_scale: rounds float32 weight scales of a layer of this scheme.
        input_scale: rounds a static input scale.
    """

    dtype: torch.dtype
    weight_scale: Callable[[torch.Tensor, Scheme], torch.Tensor]
    input_scale: Callable[[float], float]


@dataclass(frozen=True)
class GroupUnderWay:
    """One group's linears, on their way from the device to main memory."""

    _members: list[str]
    _policy: Policy
    _chosen: Diagonal | None
    _quantizer: InputQuantizer
    _parts: Sequence[Sequence[str]]
    _download: Download

    def result(self) -> tuple[dict[str, QuantizedLinear], GroupReport]:
        """The linears in main memory, and how they came out. Waits for them; may be called in another thread."""
        figures, *tensors = self._download.result()
        relative, *extents = figures.tolist()
        found = iter(tensors)
        linears = {
            name: QuantizedLinear(
                scheme=self._policy.scheme,
                input_scale=self._quantizer.scale,
                input_zero_point=self._quantizer.zero_point,
                **{part: next(found) for part in parts},
            )
            for name, parts in zip(self._members, self._parts, strict=True)
        }
        before, after = extent(extents[:3]), extent(extents[3:])
        return linears, report(self._members, self._policy, self._chosen, relative, before, after)


@torch.no_grad()
def quantize_group(
    folded: Folded,
    group: Group,
    policies: Mapping[str, Policy | None],
    statistics: InputStatistics,
    chosen: Diagonal | None,
    storage: Storage,
    at_once: int = 1 << 27,
) -> GroupUnderWay:
    """Quantize the linears of one group whose policy says so, all in one way, on the device of its statistics.

    Args:
        folded, chosen: from `smooth`; chosen is None for a group without smoothing.
        group: as there.
        policies: of its linears, one kind (see `apart`).
        statistics: of the group's input.
        storage: what the output format keeps.
        at_once: how many weights GPTQ rounds at a time on a device, where its steps cost the same for any number.
    """
    policy = policy_of(group, policies)
    assert policy is not None
    members = [name for name in group.linears if policies[name] is not None]
    inputs = statistics.smoothed(folded.columns(members[0]))
    quantizer = input_quantizer(policy, inputs, storage)
    noisy = quantizer(inputs.sample)
    rounder = _Rounder(policy, inputs, noisy, storage, at_once)
    few = slice(None, None, max(1, len(inputs.sample) // _REPORT_TOKENS))
    error = _Error(inputs.sample[few], noisy[few])
    parts = [
        found if (bias := folded.vector(f"{name}.bias")) is None else found | {"bias": bias}
        for name, found in _round(folded, members, rounder, error).items()
    ]
    ends = [*extremes(statistics.low, statistics.high), *extremes(inputs.low, inputs.high)]
    figures = torch.stack([error.relative, *map(widened, ends)])
    download = Download([figures, *(tensor for each in parts for tensor in each.values())])
    return GroupUnderWay(members, policy, chosen, quantizer, [[*each] for each in parts], download)


class _Rounder:
    """Rounds the weights of one group as a policy says.

    Attributes:
        device: where it computes.
        chunk: how many weights are best rounded at a time.
    """

    def __init__(self, policy: Policy, inputs: Smoothed, noisy: torch.Tensor, storage: Storage, at_once: int) -> None:
        self.args = policy.scheme.weights
        self._gptq: GPTQ | None = None
        if policy.rounding.method == "gptq":
            noise = (noisy - inputs.sample).square_()
            if inputs.importance is not None:
                noise *= (inputs.importance.tokens / inputs.importance.tokens.mean())[:, None]
            keep = inputs.importance is not None and self.args.type == "int" and self.args.num_bits < _FINE
            self._gptq = GPTQ(inputs.hessian, noise.mean(), self.args, inputs.hessian_tokens, keep=keep)
        clip = policy.clip and self.args.type == "int"
        energy = inputs.energy
        if clip and self._gptq is not None and self.args.num_bits < _FINE:
            energy = self._gptq.energy
        self._search = ScaleSearch(
            args=self.args,
            ratios=_CLIP_RATIOS if clip else (1.0,),
            error=ErrorByEnergy(energy) if clip else None,
            storable=lambda scale: storage.weight_scale(scale, policy.scheme),
            signed=clip and policy.scheme.has_signed_scales and self.args.num_bits < _FINE,
        )
        self._refinement: Refinement | None = None  # with effort: high alone
        if self._gptq is not None and self._gptq.hessian is not None and self.args.strategy in ("channel", "group"):
            self._refinement = Refinement(self._gptq.hessian, self.args, self._search.storable)
        self.device = noisy.device
        on_cpu = self.device.type == "cpu"
        self.chunk = _CHUNK if self._gptq is None else _GPTQ_CHUNK if on_cpu else at_once

    def scale_of_all(self, folded: Folded, name: str) -> Scales | None:
        """The one scale that all rows of a linear share; None where they don't."""
        if self.args.strategy != "tensor":
            return None
        return self._search.of_tensor(
            lambda: (folded.rows(*rows) for chunk in chunks(folded, [name], self.chunk) for rows in chunk)
        )

    def scales(self, parts: Sequence[torch.Tensor], together: torch.Tensor) -> Scales:
        """Of some rows of linears, each [rows, in], and of all in one tensor."""
        if self.args.rows == 1:
            return self._search.of_rows(together)
        found = [self._search.of_rows(part) for part in parts]  # of blocks, which have no zero points
        return Scales(torch.cat([each.scale for each in found]), torch.cat([each.bound for each in found]))

    def round(self, weight: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, Scales]:
        """Some rows [rows, in], in the type that they are kept in; and their scales, which may be better ones."""
        if self._gptq is None:
            rounded = round_to_nearest(weight, scales.scale, scales.bound, self.args, scales.zero_point)
            return rounded.to(storage_dtype(self.args)), scales
        rounded = self._gptq.round(weight, scales.scale, scales.zero_point)
        return (rounded, scales) if self._refinement is None else self._refinement(weight, rounded, scales)


class _Error:
    """The squared error of a group's output on a few tokens, relative to its square.

    Args:
        sample, noisy: the input before and after it is quantized, float32 [tokens, in].
    """

    def __init__(self, sample: torch.Tensor, noisy: torch.Tensor) -> None:
        self._sample, self._noisy = sample, noisy
        self._error = self._signal = torch.zeros_like(widened(sample.new_zeros(())))

    def add(self, weight: torch.Tensor, rounded: torch.Tensor) -> None:
        """Some rows of a weight [rows, in], and what their integers stand for."""
        reference = self._sample @ weight.t()
        self._error = self._error + (self._noisy @ rounded.t()).sub_(reference).square_().sum()
        self._signal = self._signal + reference.square_().sum()

    @property
    def relative(self) -> torch.Tensor:
        """[], on the device."""
        return self._error / self._signal.clamp(min=1e-30)


def _round(
    folded: Folded, members: Sequence[str], rounder: _Rounder, error: _Error
) -> dict[str, dict[str, torch.Tensor]]:
    """Of each linear the parts of a `QuantizedLinear`: its weight, scales, and zero points where it has some."""
    shapes = {name: folded.shape(name) for name in members}
    of_all = {name: rounder.scale_of_all(folded, name) for name in members}
    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        scales_shape = rounder.args.scales_shape(shape)
        made[name] = {
            "weight": torch.empty(shape, dtype=storage_dtype(rounder.args), device=rounder.device),
            "weight_scale": torch.empty(scales_shape, device=rounder.device),
        }
        if not rounder.args.symmetric:
            made[name]["weight_zero_point"] = torch.empty(scales_shape, dtype=torch.int8, device=rounder.device)
    step = rounder.args.rows
    for chunk in chunks(folded, members, rounder.chunk, step):
        parts = [folded.rows(*rows) for rows in chunk]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        scales = _shared(chunk, of_all) or rounder.scales(parts, weight)
        rounded, scales = rounder.round(weight, scales)
        error.add(weight, dequantize(rounded, scales.scale, rounder.args, scales.zero_point))
        first = 0
        for name, start, stop in chunk:
            last = first + stop - start
            made[name]["weight"][start:stop] = rounded[first:last]
            if rounder.args.strategy == "tensor":
                made[name]["weight_scale"].copy_(scales.scale[first : first + 1])
            else:
                made[name]["weight_scale"][start // step : -(-stop // step)] = scales.scale[first:last:step]
            if scales.zero_point is not None:
                made[name]["weight_zero_point"][start:stop] = scales.zero_point[first:last]
            first = last
    return made


def _shared(chunk: Iterable[Rows], of_all: Mapping[str, Scales | None]) -> Scales | None:
    """The scales of some rows of linears that have one for all of theirs; None where they don't."""
    parts = []
    for name, start, stop in chunk:
        found = of_all[name]
        if found is None:
            return None
        parts.append(Scales(found.scale.expand(stop - start), found.bound.expand(stop - start)))
    return Scales(torch.cat([part.scale for part in parts]), torch.cat([part.bound for part in parts]))


def policy_of(group: Group, policies: Mapping[str, Policy | None]) -> Policy | None:
    """The policy of a group's quantized members; None when there are none."""
    return next((policy for name in group.linears if (policy := policies[name]) is not None), None)


def apart(group: Group, policies: Mapping[str, Policy | None]) -> list[dict[str, Policy | None]]:
    """The policies of a group's members, those of one kind at a time: all others are None.

    Members that are quantized in unlike ways share their input and its smoothing, and nothing else.
    """
    kinds: dict[str, list[str]] = {}
    for name in group.linears:
        if (policy := policies[name]) is not None:
            kinds.setdefault(policy.model_dump_json(exclude={"layers"}), []).append(name)
    return [{name: policies[name] if name in kind else None for name in group.linears} for kind in kinds.values()]


def needs_hessian(policy: Policy) -> bool:
    """Whether quantizing wants the Hessian of the group's input."""
    transform = transform_of(policy)
    return policy.rounding.method == "gptq" or (transform is not None and transform.needs_hessian)


def needs_tokens(policy: Policy) -> bool:
    """Whether what comes out depends on calibration tokens at all."""
    return policy.scheme.is_static or policy.smoothing.method != "none" or policy.clip or needs_hessian(policy)


def uses_importance(policy: Policy) -> bool:
    """Whether how much its errors matter changes what comes out."""
    return policy.smoothing.method != "none" or policy.clip or policy.rounding.method == "gptq"


def input_quantizer(policy: Policy, inputs: Smoothed, storage: Storage) -> InputQuantizer:
    """What quantizes the input of a group: where it is static with the scale as stored, and its zero point."""
    args = policy.scheme.activations
    if policy.activations.mode != "static" or args is None:
        return InputQuantizer(args)
    low, high = observers.static_range(inputs, policy.activations.observer, args)
    scale, _ = asymmetric_parameters(torch.tensor(low), torch.tensor(high), args)
    kept = storage.input_scale(float(scale))
    zero_point = round(args.qmin - min(low, 0.0) / kept)
    return InputQuantizer(args, kept, max(args.qmin, min(args.qmax, zero_point)))
