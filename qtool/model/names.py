"""Names: what a module calls a parameter, and what the checkpoint calls the tensors that make it up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qtool.errors import InputError
from qtool.model.architectures import FusedExperts


@dataclass(frozen=True)
class ExpertNames:
    """The linears of one expert, as the checkpoint names them, without ".weight"; gate is None where it has none."""

    gate: str | None
    up: str
    down: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts.values())

    @property
    def parts(self) -> dict[str, str]:
        """By gate_proj, up_proj, down_proj."""
        gate = {} if self.gate is None else {"gate_proj": self.gate}
        return {**gate, "up_proj": self.up, "down_proj": self.down}


@dataclass(frozen=True)
class Conversion:
    """How a parameter of the model is made of tensors of the checkpoint.

    Attributes:
        converter: transformers' own.
        parts: the checkpoint's names, by the pattern of the converter that they fit, in order.
    """

    converter: Any
    parts: dict[str, list[str]]

    def convert(self, name: str, tensors: dict[str, list[torch.Tensor]], model: Any) -> torch.Tensor:
        """The parameter of this name from the tensors of its parts."""
        converter, made = self.converter, dict[str, Any](tensors)
        for operation in converter.operations:
            made = operation.convert(
                made,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        found = made if len(made) == 1 else {pattern: made[pattern] for pattern in made if pattern in name}
        tensor = next(iter(found.values()))
        return tensor[0] if isinstance(tensor, list) else tensor


class Names:
    """transformers' own renaming of checkpoints to modules, backwards.

    A checkpoint may have other names than the module's code, with or without the prefix of the base model, and the
    parameters of the code may be made of several tensors. Experts are separate linears in checkpoints and one fused
    parameter in transformers 5 (conversion_mapping.py); Mixtral's block_sparse_moe is an mlp there.

    Args:
        model: transformers', for its renaming.
        tensors: of the model, by its names.
        stored: the checkpoint's names.
    """

    def __init__(self, model: Any, tensors: Mapping[str, torch.Tensor], stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        order = {pattern: i for converter in converters for i, pattern in enumerate(converter.source_patterns)}
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = model.base_model_prefix
        self._stored: dict[str, str] = {}
        self._conversions: dict[str, Conversion] = {}
        self._parts: dict[str, dict[int, dict[int, str]]] = {}
        self._tied = _tied(model)
        numbered: dict[tuple[str, str], dict[int, str]] = {}
        for name in sorted(stored, key=dot_natural_key):  # some renamings begin with the first name that they fit
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
            if renamed not in tensors and name in tensors:
                renamed, pattern = rename_source_key(name, [], [], prefix, tensors)
            if pattern is None:
                self._stored.setdefault(renamed, name)
                continue
            if (number := re.search(r"\.experts\.(\d+)\.", name)) and name.endswith(".weight"):
                numbered.setdefault((renamed, pattern), {})[int(number[1])] = name.removesuffix(".weight")
                continue
            converter = by_pattern[pattern]
            for target in _targets(renamed, converter):
                made = self._conversions.setdefault(target, Conversion(converter, {}))
                made.parts.setdefault(pattern, []).append(name)
        for (renamed, pattern), experts in numbered.items():
            # Ernie-VL's file numbers the experts for text and those for pictures one after the other.
            targets = _targets(renamed, by_pattern[pattern])
            each = -(-len(experts) // len(targets))
            for position, expert in enumerate(sorted(experts)):
                target, first = targets[position // each], (position // each) * each if len(targets) > 1 else 0
                self._parts.setdefault(target, {}).setdefault(expert - first, {})[order[pattern]] = experts[expert]

    def stored(self, name: str) -> str:
        """The checkpoint's name of a parameter that it holds as one tensor; `name` itself where nothing is known."""
        if name in self._stored:
            return self._stored[name]
        return next((self._stored[other] for other in self._tied.get(name, ()) if other in self._stored), name)

    def is_tied(self, name: str) -> bool:
        """Whether the model uses this parameter under another name as well."""
        return name in self._tied

    def conversion(self, name: str) -> Conversion | None:
        """How a parameter is made of several tensors, or of one in another form; None where it is one as it is."""
        if name in self._stored:
            return None
        return self._conversions.get(name)

    @cached_property
    def modules(self) -> dict[str, str]:
        """The model's names of what is stored as it is, by the checkpoint's names."""
        return {stored: name for name, stored in self._stored.items()}

    def splits(self, name: str) -> bool:
        """Whether the checkpoint has linears of separate experts in place of this parameter, as transformers knows."""
        return name in self._parts

    def experts(self, name: str, experts: FusedExperts, where: str) -> list[ExpertNames]:
        """The linears of each of these experts, by the whole name of their module.

        Raises InputError, about the model at `where`, when one is missing.
        """
        fused, down = (self._parts.get(f"{name}.{part}", {}) for part in (experts.gate_up, experts.down))
        count, found = experts.count, []
        for number in range(count):
            gate_up, last = fused.get(number, {}), down.get(number, {})
            if len(gate_up) != (2 if experts.has_gate else 1) or len(last) != 1:
                present = sorted([*gate_up.values(), *last.values()])
                raise InputError(
                    f"expert {number} of {name} is {f'incomplete: only {present} exist' if present else 'missing'}",
                    where=where,
                    hint=f"config.json says that there are {count} experts; is a shard missing?",
                )
            found.append(ExpertNames(gate_up[0] if experts.has_gate else None, max(gate_up.items())[1], last[0]))
        extra = max([*fused, *down], default=-1)
        if extra >= count and not experts.has_identities:
            raise InputError(
                f"{name} has an expert {extra}, config.json makes them {count}",
                where=where,
                hint="check that config.json belongs to these weights",
            )
        return found


def _tied(model: Any) -> dict[str, list[str]]:
    """The names of the parameters that are the same tensor, by each of them, as transformers ties them."""
    groups: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, {source}).add(target)
    return {name: sorted(group - {name}) for group in groups.values() for name in group}


def _targets(renamed: str, converter: Any) -> list[str]:
    """The parameters that a converter makes, where the first is called so."""
    first, *others = converter.target_patterns
    return [renamed, *(renamed.replace(first, other) for other in others)]
