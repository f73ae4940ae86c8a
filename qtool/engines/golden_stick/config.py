"""A recipe's scheme as Golden Stick's configuration (mindspore-gs 1.4.1, ptq_config.py and algo_module.py).

Golden Stick takes an ordered mapping from regexes to PTQConfigs. It matches each from the start of a cell's name
("network.model.layers.0.self_attn.q_proj") and refuses a cell that two of them match, where a recipe's first match
wins; so every pattern here excludes the ones before it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from qtool.errors import InputError

_ALPHA = 0.5  # SmoothQuantSmoother, for MindOne, takes no other


def patterns(policies: Sequence[dict[str, Any]]) -> list[str]:
    r"""For each policy the regex under which Golden Stick finds exactly the cells that the recipe gives to it.

    Raises:
        InputError: a pattern that can't stand inside another (inline flags such as `(?i)`).
    """
    result, before = [], ""
    for policy in policies:
        whole = rf"(?:{policy['layers']})\Z"
        result.append(rf"network\.{before}{whole}")
        before += f"(?!{whole})"
        try:
            re.compile(result[-1])
        except re.error as error:
            raise InputError(
                f"the golden-stick engine can't combine this pattern with others: {error}", where=policy["layers"]
            ) from None
    return result


def differences(policies: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each choice of a scheme that Golden Stick makes differently."""
    found = []
    quantized = [policy for policy in policies if policy["quantize"]]
    if any(policy["rounding"]["method"] == "gptq" for policy in quantized):
        found.append("Golden Stick rounds W8A8 weights to nearest; `rounding: gptq` has no effect")
    if any(policy["smoothing"]["method"] == "osl" and not policy["clip"] for policy in quantized):
        found.append("Golden Stick always clips weights after OSL; `clip: false` has no effect there")
    static = [policy["activations"] for policy in quantized if policy["activations"]["mode"] == "static"]
    observers = {activations["observer"]["method"] for activations in static} - {"minmax"}
    if observers:
        found.append(
            f"Golden Stick fixes static ranges by minimum and maximum; `observer: {min(observers)}` has no effect"
        )
    if any(policy["smoothing"].get("alpha", _ALPHA) != _ALPHA for policy in quantized):
        found.append(f"Golden Stick smooths with alpha {_ALPHA}; `alpha` has no effect")
    return found


def network() -> Any:
    """The PTQConfig of everything that no policy names: float."""
    from mindspore_gs.ptq import PTQConfig

    return PTQConfig(weight_quant_dtype=None, act_quant_dtype=None)


def layer_policies(policies: Sequence[dict[str, Any]]) -> OrderedDict[str, Any]:
    """The scheme as regex → PTQConfig."""
    return OrderedDict(zip(patterns(policies), map(_config, policies), strict=True))


def _config(policy: dict[str, Any]) -> Any:
    from mindspore import dtype
    from mindspore_gs.ptq import OutliersSuppressionType, PTQConfig, QuantGranularity

    if not policy["quantize"]:
        return network()
    smoothing = {
        "osl": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        "smoothquant": OutliersSuppressionType.SMOOTH,
        "none": OutliersSuppressionType.NONE,
    }
    static = policy["activations"]["mode"] == "static"
    return PTQConfig(
        weight_quant_dtype=dtype.int8,
        act_quant_dtype=dtype.int8,
        act_quant_granularity=QuantGranularity.PER_TENSOR if static else QuantGranularity.PER_TOKEN,
        outliers_suppression=smoothing[policy["smoothing"]["method"]],
        weight_clip=policy["clip"],
    )
