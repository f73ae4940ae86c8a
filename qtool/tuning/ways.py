"""The ways to quantize each linear that are compared: the scheme's own, or the precisions that a runtime reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qtool.recipe.schema import Policy
from qtool.runtimes.description import Quantized, Runtime
from qtool.scheme import PRESETS, Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.formats import QuantizedFormat

Policies = dict[str, Policy | None]

_SIZES = (128, 64, 32)  # of groups, that runtimes have kernels for
_LAYER = "model.layers.0.mlp.down_proj"
_AS_IT_IS = "as in the scheme"


def precisions(runtime: Runtime, format: QuantizedFormat, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the presets that a format holds and a runtime reads, without reservation, of such a model.

    8-bit weights beside float activations are left out where the runtime takes 8-bit activations too: they have the
    same size, lose less, and compute with floats, so that nothing else would ever be chosen. So are blocks, which are
    for models that have them.
    """
    found = {}
    for name, preset in PRESETS.items():
        scheme = _in_groups(preset, _SIZES[-1])
        model = Quantized(config, {_LAYER: scheme})
        if (
            scheme.weights.block_structure is None
            and format.expresses(scheme)
            and not any(limitation.refuses for limitation in runtime.limitations(format.name, model))
        ):
            found[name] = preset
    with_integers = any(_bits(scheme) == (8, True) for scheme in found.values())
    return tuple(name for name, scheme in found.items() if not (with_integers and _bits(scheme) == (8, False)))


def group_size(widths: Iterable[int]) -> int | None:
    """The largest size of groups that divides all of these numbers of input channels; None if none does."""
    wanted = set(widths)
    return next((size for size in _SIZES if not any(width % size for width in wanted)), None)


def of_modes(policies: Mapping[str, Policy | None], modes: Sequence[str]) -> dict[str, Policies]:
    """Activations of each kind, static or dynamic, everywhere; what is float (None) stays float."""
    return {mode: {name: policy and policy.with_mode(mode) for name, policy in policies.items()} for mode in modes}


def of_precisions(policies: Mapping[str, Policy | None], names: Sequence[str], size: int | None) -> dict[str, Policies]:
    """Each precision everywhere, and the scheme's own where it is none of them; what is float (None) stays float.

    Args:
        policies: of the scheme, without `symmetric: auto`.
        names: of presets.
        size: of groups, for those that have some; without it they are left out.
    """
    schemes = [PRESETS[name] for name in names]
    known = [_in_groups(scheme, size) for scheme in schemes if size is not None or scheme.weights.group_size is None]
    ways = {
        scheme.label: {name: policy and _with(policy, scheme) for name, policy in policies.items()} for scheme in known
    }
    others = {name: policy for name, policy in policies.items() if policy and policy.scheme not in known}
    return ways | ({_AS_IT_IS: dict.fromkeys(policies) | others} if others else {})


def way_of(name: str, policy: Policy, ways: Mapping[str, Mapping[str, Policy | None]]) -> str:
    """The way that has a linear just as its policy does."""
    return next(way for way, policies in ways.items() if (own := policies[name]) and own.scheme == policy.scheme)


def _with(policy: Policy, scheme: Scheme) -> Policy:
    return policy if policy.scheme == scheme else policy.with_scheme(scheme)


def _in_groups(scheme: Scheme, size: int | None) -> Scheme:
    if scheme.weights.group_size is None or size is None:
        return scheme
    return replace(scheme, weights=replace(scheme.weights, group_size=size))


def _bits(scheme: Scheme) -> tuple[int, bool]:
    """(of the weights, whether activations are quantized)."""
    return scheme.weights.num_bits, scheme.activations is not None
