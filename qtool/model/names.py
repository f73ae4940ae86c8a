"""Names: what a module calls a parameter, and what the checkpoint calls the tensors that make it up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from qtool.errors import InputError
from qtool.model.architectures import FusedExperts


class ExpertNames(NamedTuple):
    """The linears of one expert, as the checkpoint names them, without ".weight"."""

    gate: str
    up: str
    down: str


class Names:
    """transformers' own renaming of checkpoints to modules, backwards.

    Experts are separate linears in checkpoints and one fused parameter in transformers 5 (conversion_mapping.py);
    Mixtral's block_sparse_moe is an mlp there.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        order = {pattern: i for converter in converters for i, pattern in enumerate(converter.source_patterns)}
        self._stored: dict[str, str] = {}
        self._parts: dict[str, dict[int, dict[int, str]]] = {}
        for name in stored:
            renamed, pattern = rename_source_key(name, renamings, converters)
            if pattern is None:
                self._stored.setdefault(renamed, name)
            elif (number := re.search(r"\.experts\.(\d+)\.", name)) and name.endswith(".weight"):
                parts = self._parts.setdefault(renamed, {}).setdefault(int(number[1]), {})
                parts[order[pattern]] = name.removesuffix(".weight")

    def stored(self, name: str) -> str:
        """The checkpoint's name of a parameter that it holds as one tensor; `name` itself where nothing is known."""
        return self._stored.get(name, name)

    def experts(self, name: str, experts: FusedExperts, where: str) -> list[ExpertNames]:
        """The linears of each of these experts, by the whole name of their module.

        Raises InputError, about the model at `where`, when one is missing.
        """
        fused, down = (self._parts.get(f"{name}.{part}", {}) for part in (experts.gate_up, experts.down))
        count, found = experts.count, []
        for number in range(count):
            gate_up, last = fused.get(number, {}), down.get(number, {})
            if len(gate_up) != 2 or len(last) != 1:
                present = sorted([*gate_up.values(), *last.values()])
                raise InputError(
                    f"expert {number} of {name} is {f'incomplete: only {present} exist' if present else 'missing'}",
                    where=where,
                    hint=f"config.json says that there are {count} experts of three linears each; is a shard missing?",
                )
            found.append(ExpertNames(gate_up[0], gate_up[1], last[0]))
        extra = max([*fused, *down], default=-1)
        if extra >= count:
            raise InputError(
                f"{name} has an expert {extra}, config.json makes them {count}",
                where=where,
                hint="check that config.json belongs to these weights",
            )
        return found
