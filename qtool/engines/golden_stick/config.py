"""A recipe's scheme as Golden Stick's configuration (mindspore-gs 1.4.1, ptq_config.py and algo_module.py).

Golden Stick takes an ordered mapping from regexes to PTQConfigs. It matches each from the start of a cell's name
("network.model.layers.0.self_attn.q_proj") and refuses a cell that two of them match, where a recipe's first match
wins; so every pattern here excludes the ones before it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtool.engines.golden_stick.tasks import LayerPolicy
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.recipe.schema import Policy

_ALPHA = 0.5  # SmoothQuantSmoother, for MindOne, takes no other


def patterns(layers: Sequence[str]) -> list[str]:
    r"""For each policy the regex under which Golden Stick finds exactly the cells that the recipe gives to it.

    Args:
        layers: the policies' own regexes, in order.

    Raises:
        InputError: a pattern that can't stand inside another (inline flags such as `(?i)`).
    """
    result, before = [], ""
    for pattern in layers:
        whole = rf"(?:{pattern})\Z"
        result.append(rf"network\.{before}{whole}")
        before += f"(?!{whole})"
        try:
            re.compile(result[-1])
        except re.error as error:
            raise InputError(
                f"the golden-stick engine can't combine this pattern with others: {error}", where=pattern
            ) from None
    return result


def differences(policies: Sequence[Policy]) -> list[str]:
    """One sentence for each choice of a scheme that Golden Stick makes differently."""
    found = []
    quantized = [policy for policy in policies if policy.quantize]
    if any(policy.rounding.method == "gptq" for policy in quantized):
        found.append("Golden Stick rounds W8A8 weights to nearest; `rounding: gptq` has no effect")
    if any(policy.smoothing.method == "osl" and not policy.clip for policy in quantized):
        found.append("Golden Stick always clips weights after OSL; `clip: false` has no effect there")
    static = [policy.activations for policy in quantized if policy.activations.mode == "static"]
    observers = {activations.observer.method for activations in static} - {"minmax"}
    if observers:
        found.append(
            f"Golden Stick fixes static ranges by minimum and maximum; `observer: {min(observers)}` has no effect"
        )
    smoothings = [policy.smoothing for policy in quantized]
    if any(smoothing.method == "smoothquant" and smoothing.alpha != _ALPHA for smoothing in smoothings):
        found.append(f"Golden Stick smooths with alpha {_ALPHA}; `alpha` has no effect")
    return found


def layer_policy(policy: Policy) -> LayerPolicy:
    """What of a recipe's policy mindspore-gs is told."""
    return LayerPolicy(
        layers=policy.layers,
        quantize=policy.quantize,
        per_token=not policy.scheme.is_static,
        smoothing=policy.smoothing.method,
        clip=policy.clip,
    )


def network() -> Any:
    """The PTQConfig of everything that no policy names: float."""
    from mindspore_gs.ptq import PTQConfig

    return PTQConfig(weight_quant_dtype=None, act_quant_dtype=None)


def layer_policies(policies: Sequence[LayerPolicy]) -> OrderedDict[str, Any]:
    """The scheme as regex → PTQConfig."""
    regexes = patterns([policy.layers for policy in policies])
    return OrderedDict(zip(regexes, map(_config, policies), strict=True))


def _config(policy: LayerPolicy) -> Any:
    from mindspore import dtype
    from mindspore_gs.ptq import OutliersSuppressionType, PTQConfig, QuantGranularity

    if not policy.quantize:
        return network()
    smoothing = {
        "osl": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        "smoothquant": OutliersSuppressionType.SMOOTH,
        "none": OutliersSuppressionType.NONE,
    }
    return PTQConfig(
        weight_quant_dtype=dtype.int8,
        act_quant_dtype=dtype.int8,
        act_quant_granularity=QuantGranularity.PER_TOKEN if policy.per_token else QuantGranularity.PER_TENSOR,
        outliers_suppression=smoothing[policy.smoothing],
        weight_clip=policy.clip,
    )
