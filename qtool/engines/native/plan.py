"""What a quantization will do, before it does it: layer groups, schemes, sizes, problems."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.checkpoint import formats
from qtool.checkpoint.floats import FORMATS
from qtool.checkpoint.formats import Mode
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.report import LayersSummary
from qtool.errors import InputError
from qtool.recipe.schema import Policy, Recipe

if TYPE_CHECKING:
    from qtool.model.weights import ModelWeights


@dataclass(frozen=True)
class QuantizationPlan:
    """Which linears of a checkpoint are quantized, and how.

    Attributes:
        policies: every linear inside the decoder layers, by its full name without ".weight"; None leaves it float.
        warnings: what the output's runtimes may not like.
    """

    policies: dict[str, Policy | None]
    warnings: list[str]

    @property
    def modes(self) -> dict[str, Mode]:
        return {name: policy.activations.mode if policy else "float" for name, policy in self.policies.items()}


def make(checkpoint: Checkpoint, recipe: Recipe, scheme: str, format_name: str, linears: list[str]) -> QuantizationPlan:
    """Match a recipe's scheme with a checkpoint's linear layers.

    Raises:
        InputError: nothing could or would be quantized, or the format can't express the plan.
    """
    if not linears:
        raise InputError(
            "the decoder layers of this architecture hold no torch.nn.Linear, and qtool quantizes nothing else",
            where=str(checkpoint.path / "config.json"),
            hint="GPT-2 and its like, which compute with Conv1D, aren't supported",
        )
    policies = {name: recipe.policy(scheme, name) for name in linears}
    where = f"recipe {recipe.name}, scheme {scheme}"
    if not any(policies.values()):
        raise InputError(
            f"no linear layer of this model would be quantized ({len(linears)} looked at, e.g. {linears[0]})",
            where=where,
            hint="correct the `layers` patterns; they must match the whole name",
        )
    modes: dict[str, Mode] = {n: p.activations.mode if p else "float" for n, p in policies.items()}
    problems = formats.get(format_name).problems(modes)
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise InputError(
            str(fatal[0]) + (f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""),
            where=f"{where}, format {format_name}",
            hint="give the layers that the runtime fuses one policy",
        )
    return QuantizationPlan(policies, [str(problem) for problem in problems])


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises InputError unless the checkpoint is a float model."""
    if checkpoint.format not in FORMATS:
        raise InputError(
            f"this checkpoint is quantized already ({checkpoint.format})",
            where=str(checkpoint.path),
            hint="quantize the original float model",
        )


def summary(plan: QuantizationPlan) -> list[LayersSummary]:
    """One row per kind of layer: the name with its numbers replaced by *, how many, and its policy."""
    counts: Counter[tuple[str, str]] = Counter()
    described: dict[tuple[str, str], LayersSummary] = {}
    for name, policy in plan.policies.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        key = (pattern, policy.model_dump_json() if policy else "")
        counts[key] += 1
        described[key] = LayersSummary(pattern, counts[key], describe(policy))
    return list(described.values())


def describe(policy: Policy | None) -> str:
    if policy is None:
        return "float"
    activations = policy.activations
    range_ = "per-token dynamic" if activations.mode == "dynamic" else f"per-tensor static ({activations.observer})"
    extras = [policy.smoothing, "clip" if policy.clip else "", policy.rounding]
    return f"W8A8 {range_}, {', '.join(e for e in extras if e and e != 'none')}"


def output_bytes(weights: ModelWeights, modes: Mapping[str, Mode]) -> int:
    """Size of the output's tensors: a byte per quantized weight, scales, and the rest in the model's float type."""
    total = 0
    for name in weights.names:
        mode = modes.get(name.removesuffix(".weight"), "float") if name.endswith(".weight") else "float"
        if mode == "float":
            total += weights.nbytes(name)
        else:
            rows, columns = weights.shape(name)
            total += rows * columns + 4 * rows
    return total
