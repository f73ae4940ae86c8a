"""Which linears to quantize how, so that the least KL divergence is left in so many bytes, or the reverse.

The divergences that single layers cause add up (on SmolLM2, W8A8, the estimates' sum is within a few per cent of the
whole). So each byte is spent where it removes most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.recipe.schema import Policy

FLOAT = "float"
_ANY = "<any>"  # no name of a tensor has it, and re.escape leaves it alone


def with_mode(policies: Mapping[str, Policy | None], mode: str) -> dict[str, Policy | None]:
    """The same policies with activations static or dynamic throughout; what is float (None) stays float."""
    return {name: policy and policy.with_mode(mode) for name, policy in policies.items()}


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its name (FLOAT, or one of the sensitivity's ways), KL divergence and bytes."""

    way: str
    kl: float
    bytes: int


@dataclass(frozen=True)
class Unit:
    """Linears that share their input, and so their smoothing and their scheme, by full name."""

    linears: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def smallest(self) -> Option:
        return min(self.options, key=lambda option: (option.bytes, option.kl))


Choice = dict[Unit, Option]


def within_bytes(units: Sequence[Unit], most: int) -> Choice:
    """The least KL divergence, greedily, in at most so many bytes (or in the fewest there can be)."""
    chosen = {unit: unit.smallest for unit in units}
    room = most - total_bytes(chosen)
    for unit, option in _upgrades(units):
        if option.bytes - chosen[unit].bytes <= room and option.kl < chosen[unit].kl:
            room -= option.bytes - chosen[unit].bytes
            chosen[unit] = option
    return chosen


def within_kl(units: Sequence[Unit], most: float) -> Choice:
    """The fewest bytes, greedily, with at most so much KL divergence (or with the least there can be)."""
    chosen = {unit: unit.smallest for unit in units}
    taken: list[Unit] = []
    for unit, option in _upgrades(units):
        if total_kl(chosen) <= most:
            break
        if option.kl < chosen[unit].kl:
            chosen[unit] = option
            taken.append(unit)
    for unit in sorted(taken, key=lambda unit: -chosen[unit].bytes):  # the last step can make earlier ones needless
        without = total_kl(chosen) - chosen[unit].kl + unit.smallest.kl
        if without <= most:
            chosen[unit] = unit.smallest
    return chosen


def total_bytes(chosen: Choice) -> int:
    return sum(option.bytes for option in chosen.values())


def total_kl(chosen: Choice) -> float:
    return sum(option.kl for option in chosen.values())


def _upgrades(units: Sequence[Unit]) -> list[tuple[Unit, Option]]:
    """Steps away from the smallest option, those that remove most per byte first."""
    steps = [
        ((unit.smallest.kl - option.kl) / (option.bytes - unit.smallest.bytes), unit, option)
        for unit in units
        for option in unit.options
        if option.bytes > unit.smallest.bytes and option.kl < unit.smallest.kl
    ]
    return [(unit, option) for _, unit, option in sorted(steps, key=lambda step: -step[0])]


def policies(chosen: Choice, ways: Mapping[str, Mapping[str, Policy | None]]) -> list[dict[str, Any]]:
    """The choice as a recipe's list of policies, one for all linears that are treated alike.

    Args:
        chosen: an option for every unit.
        ways: the policy of each linear in each way but FLOAT; also of those that the choice leaves as they are.
    """
    alike: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for unit, option in chosen.items():
        for name in unit.linears:
            policy = None if option.way == FLOAT else ways[option.way][name]
            content: dict[str, Any] = {"quantize": False}
            if policy is not None:
                content = policy.model_dump(mode="json", exclude={"layers"}, exclude_defaults=True)
            alike.setdefault(repr(content), (content, []))[1].append(name)
    everything = dict.fromkeys(name for way in ways.values() for name in way)
    return [{"layers": pattern(names, everything), **content} for content, names in alike.values()]


def pattern(names: Iterable[str], everything: Iterable[str]) -> str:
    """A regular expression for just these of all linears: numbers of layers put together, `\\d+` where it is all.

    All experts of a layer are alike, so their numbers are `\\d+` always.
    """
    all_numbers = _numbers(everything)
    alike: dict[tuple[str, str], list[str]] = {}
    for (before, after), numbers in _numbers(names).items():
        if not numbers:
            middle = ""
        elif len(numbers) == len(all_numbers[before, after]) > 1:
            middle = r"\d+"
        else:
            middle = f"({'|'.join(numbers)})"
        alike.setdefault((re.escape(before), middle), []).append(re.escape(after).replace(_ANY, r"\d+"))
    return "|".join(
        before + middle + (f"({'|'.join(afters)})" if len(afters) > 1 else afters[0])
        for (before, middle), afters in alike.items()
    )


def _numbers(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Names cut at their first number: by what is before and after it (further numbers are _ANY), those that occur."""
    kinds: dict[tuple[str, str], dict[str, None]] = {}
    for name in names:
        found = re.match(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = found.groups() if found else (name, "", "")
        after = re.sub(r"(?<=\.)\d+(?=\.)", _ANY, after)
        kinds.setdefault((before, after), {}).update({number: None} if number else {})
    return {kind: list(numbers) for kind, numbers in kinds.items()}
