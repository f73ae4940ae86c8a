"""What a quantization will do, before it does it: layer groups, schemes, sizes, problems."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool import runtimes
from qtool.checkpoint import formats
from qtool.checkpoint.floats import FloatReader
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import float_dtype
from qtool.engines.report import LayersSummary, LeftFloat
from qtool.errors import InputError
from qtool.recipe.schema import Policy, Recipe
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.model.weights import ModelWeights


_CACHES = {
    "fp8": "FP8, one scale for the keys and one for the values of a layer",
    "int8": "int8, a scale and a zero point for each channel",
}
_INSTEAD = {
    "int": "leave this layer float, or in 8 bits",
    "float": "use --scheme fp8-dynamic, or give this layer another policy",
}
_MUCH = 0.05  # of the weights of the decoder's linears may stay float without a warning


@dataclass(frozen=True)
class QuantizationPlan:
    """Which linears of a checkpoint are quantized, and how.

    Attributes:
        policies: every linear inside the decoder layers, by its full name without ".weight"; None leaves it float.
        kept: why some of these stay float whatever the recipe says.
        left_float: what stays float, with its share.
        warnings: what the output's runtimes may not like.
        cache: how keys and values are kept, by its name; None for floats.
    """

    policies: dict[str, Policy | None]
    kept: Mapping[str, str]
    left_float: list[LeftFloat]
    warnings: list[str]
    cache: str | None = None

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """How each of these linears is quantized; None is float."""
        return _schemes(self.policies)


def make(
    checkpoint: Checkpoint,
    recipe: Recipe,
    scheme: str,
    format_name: str,
    linears: list[str],
    kept: Mapping[str, str] | None = None,
    weights: ModelWeights | None = None,
    *,
    symmetric: bool = False,
    measures: bool = False,
) -> QuantizationPlan:
    """Match a recipe's scheme with a checkpoint's linear layers.

    Args:
        linears: of the decoder layers, by their full names without ".weight".
        kept: why some of them stay float whatever the recipe says.
        weights: of the model, where it has linears that the checkpoint holds in another form.
        symmetric: `symmetric: auto` of a policy means true, since the engine knows nothing else.
        measures: the engine decides `mode: auto` of a policy; else it means static.

    Raises:
        InputError: nothing could or would be quantized, or the format can't express the plan.
    """
    if not linears:
        raise InputError(
            "the decoder layers of this architecture hold no torch.nn.Linear, and qtool quantizes nothing else",
            where=str(checkpoint.path / "config.json"),
            hint="models whose layers multiply by plain parameters, rather than by linear layers, aren't supported",
        )
    kept, output = kept or {}, formats.get(format_name)
    symmetric = symmetric or recipe.osl == "exact"  # as Golden Stick
    found = {name: None if name in kept else recipe.policy(scheme, name) for name in {**dict.fromkeys(linears), **kept}}
    measures = measures and recipe.osl != "exact"

    def possible(how: Scheme) -> bool:
        inputs = how.activations
        with_zero_point = inputs is not None and inputs.dynamic and not inputs.symmetric
        return output.expresses(how) and not (symmetric and with_zero_point)

    policies = {name: policy and policy.settled(possible, measures=measures) for name, policy in found.items()}
    where = f"recipe {recipe.name}, scheme {scheme}"
    if not any(policies.values()):
        raise InputError(
            f"no linear layer of this model would be quantized ({len(linears)} looked at, e.g. {linears[0]})",
            where=where,
            hint="correct the `layers` patterns; they must match the whole name",
        )
    schemes, read = _schemes(policies), weights or FloatReader(checkpoint)
    for name, how in schemes.items():
        if how is not None:
            out, width = read.shape(f"{name}.weight")
            _check_scales(name, how, (out, width), where)
            if output.expresses(how) and (why := output.misfit(name, (out, width), how)) is not None:
                raise InputError(f"{name}: {why}", where=where, hint=_INSTEAD[how.weights.type])
            if recipe.osl == "exact" and not _knows_exact(how):
                what = f"osl: exact is Golden Stick's search, which does not support {how.label}"
                raise InputError(what, where=where, hint="use osl: fast")
    problems = output.problems(schemes)  # of the static way, where there is a choice: linears of one input share it
    if recipe.cache is not None and (problem := output.cache_problem(recipe.cache)) is not None:
        problems.append(problem)
    if problems:
        raise InputError(
            problems[0].text + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            where=f"{where}, format {format_name}",
            hint=problems[0].hint,
        )
    dtype = float_dtype(checkpoint, ())
    limitations = runtimes.problems(format_name, checkpoint.config, schemes, dtype, recipe.kv_cache)
    per_token = _schemes({name: policy and _per_token(policy) for name, policy in policies.items()})
    if per_token != schemes:
        others = runtimes.problems(format_name, checkpoint.config, per_token, dtype, recipe.kv_cache)
        limitations += [each for each in others if each not in limitations]
    for limitation in limitations:
        if limitation.fatal:
            raise InputError(limitation.text, where=f"{where}, format {format_name}", hint=limitation.hint)
    left = _left_float(policies, kept, read)
    warnings = [*_much_float(left), *(str(limitation) for limitation in limitations)]
    source = formats.of(checkpoint)
    if any(source.has_lost(checkpoint, name) for name in linears):
        warnings.append(f"the source is quantized already ({source.name}); what that lost stays lost")
    return QuantizationPlan(policies, kept, left, warnings, recipe.kv_cache)


def _left_float(
    policies: Mapping[str, Policy | None], kept: Mapping[str, str], weights: ModelWeights
) -> list[LeftFloat]:
    """What stays float, linears of one kind together, the largest share first."""
    sizes = {name: math.prod(weights.shape(f"{name}.weight")) for name in policies}
    total, counts = sum(sizes.values()), Counter[tuple[str, str]]()
    shares: Counter[tuple[str, str]] = Counter()
    for name, policy in policies.items():
        if policy is None:
            key = (_pattern(name), kept.get(name, "the recipe leaves it float"))
            counts[key] += 1
            shares[key] += sizes[name]
    return [LeftFloat(*key, counts[key], round(size / total, 4)) for key, size in shares.most_common()]


def _much_float(left: Sequence[LeftFloat]) -> Iterator[str]:
    share = sum(each.share for each in left)
    if share > _MUCH:
        named = ", ".join(f"{each.layers} ({each.share:.0%}: {each.why})" for each in left[:4] if each.share >= 0.001)
        rest = "" if len(left) <= 4 else " and others"
        yield f"{share:.0%} of the weights of the decoder's linears stay float: {named}{rest}"


def _pattern(name: str) -> str:
    """A linear's name with its numbers replaced by *."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _check_scales(name: str, scheme: Scheme, shape: tuple[int, ...], where: str) -> None:
    """Raises InputError when the weight can't be divided into groups of that size."""
    try:
        scheme.weights.scales_shape(shape)
    except ValueError as error:
        fits = next((size for size in (128, 64, 32, 16) if shape[-1] % size == 0), None)
        hint = "choose another group_size for this layer"
        if fits is not None:
            hint += f": {fits} fits; --scheme {_preset(scheme)}-g{fits} gives it to all layers"
        raise InputError(f"{name}: {error}", where=where, hint=hint) from None


def _knows_exact(scheme: Scheme) -> bool:
    weights, inputs = scheme.weights, scheme.activations
    return weights.strategy == "channel" and inputs is not None and weights.type == inputs.type == "int"


def _per_token(policy: Policy) -> Policy:
    """With what `mode: auto` may become."""
    return policy.ways[1] if policy.activations.mode == "auto" else policy


def _schemes(policies: Mapping[str, Policy | None]) -> dict[str, Scheme | None]:
    return {name: None if policy is None else policy.scheme for name, policy in policies.items()}


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises InputError unless the checkpoint is a float model."""
    format = formats.of(checkpoint)
    if not format.is_source(checkpoint):
        raise InputError(
            f"this checkpoint is already quantized ({format.name})",
            where=str(checkpoint.path),
            hint="quantize the original float model; float8 of this one, for cards without int8: "
            f"qtool convert {checkpoint.path} --scheme fp8-dynamic",
        )


def summary(plan: QuantizationPlan) -> list[LayersSummary]:
    """One row per kind of layer: the name with its numbers replaced by *, how many, and its policy."""
    counts: Counter[tuple[str, str]] = Counter()
    described: dict[tuple[str, str], LayersSummary] = {}
    for name, policy in plan.policies.items():
        pattern = _pattern(name)
        key = (pattern, policy.model_dump_json() if policy else "")
        counts[key] += 1
        described[key] = LayersSummary(pattern, counts[key], describe(policy))
    cache = [] if plan.cache is None else [LayersSummary("keys and values", 1, _CACHES[plan.cache])]
    return [*described.values(), *cache]


def describe(policy: Policy | None) -> str:
    if policy is None:
        return "float"
    activations, bits = policy.activations, _bits(policy.scheme)
    if activations.mode == "static":
        bits += f" per-tensor static ({activations.observer.method})"
    elif activations.mode == "dynamic":
        bits += " per-token dynamic" + ("" if activations.symmetric else " asymmetric")
    elif activations.mode == "auto":
        zero_points = "" if activations.symmetric else " asymmetric"
        bits += f" per-tensor static where calibration finds that it costs little, else per-token dynamic{zero_points}"
    extras = [policy.smoothing.method, "clip" if policy.clip else "", policy.rounding.method]
    return f"{bits}, {', '.join(e for e in extras if e and e != 'none')}"


def _bits(scheme: Scheme) -> str:
    weights = scheme.weights
    shared = "" if weights.strategy == "channel" else f" by {weights.strategy}"
    size = weights.group_size or " x ".join(map(str, weights.block_structure or ()))
    zero_points = "" if weights.symmetric else " with zero points"
    return f"{scheme.bits}{shared}{f' of {size}' if size else ''}{zero_points}"


def _preset(scheme: Scheme) -> str:
    """How the name of a scheme in groups begins, on a command line."""
    return scheme.bits.lower() + ("" if scheme.weights.symmetric else "-asymmetric")


def output_bytes(weights: ModelWeights, schemes: Mapping[str, Scheme | None]) -> int:
    """Size of the output's tensors: quantized weights with their scales, and the rest in the model's float type."""
    total = 0
    for name in weights.names:
        scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        total += weights.nbytes(name) if scheme is None else scheme.weights.nbytes(weights.shape(name))
    return total
