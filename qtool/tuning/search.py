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


@dataclass(frozen=True)
class Point:
    """A choice's bytes, and the KL divergence that is estimated for it."""

    bytes: int
    kl: float


def within_bytes(units: Sequence[Unit], most: int) -> Choice:
    """The least KL divergence, greedily, in at most so many bytes (or in the fewest there can be)."""
    chosen = {unit: unit.smallest for unit in units}
    room = most - total_bytes(chosen)
    for unit, option in [*_upgrades(units), *_others(units)]:
        if option.bytes - chosen[unit].bytes <= room and option.kl < chosen[unit].kl:
            room -= option.bytes - chosen[unit].bytes
            chosen[unit] = option
    return chosen


def within_kl(units: Sequence[Unit], most: float) -> Choice:
    """The fewest bytes, greedily, with at most so much KL divergence (or with the least there can be)."""
    chosen = {unit: unit.smallest for unit in units}
    for unit, option in _upgrades(units):
        if total_kl(chosen) <= most:
            break
        if option.kl < chosen[unit].kl:
            chosen[unit] = option
    for unit in sorted(units, key=lambda unit: -chosen[unit].bytes):  # the last step can make earlier ones needless
        rest = total_kl(chosen) - chosen[unit].kl
        fewer = [option for option in unit.options if option.bytes < chosen[unit].bytes and rest + option.kl <= most]
        if fewer:
            chosen[unit] = min(fewer, key=lambda option: (option.bytes, option.kl))
    return chosen


def frontier(units: Sequence[Unit]) -> list[Point]:
    """From the fewest bytes to the least KL divergence, one step after the other."""
    chosen = {unit: unit.smallest for unit in units}
    size, kl = total_bytes(chosen), total_kl(chosen)
    found = [Point(size, kl)]
    for unit, option in _upgrades(units):
        size, kl = size + option.bytes - chosen[unit].bytes, kl + option.kl - chosen[unit].kl
        chosen[unit] = option
        found.append(Point(size, kl))
    return found


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Some of a frontier's points, at about equal distances of bytes, with the first and the last."""
    if len(points) <= most:
        return [*points]
    first, last = points[0].bytes, points[-1].bytes
    wanted = [first + i * (last - first) / (most - 1) for i in range(most)]
    found = [min(points, key=lambda point: abs(point.bytes - size)) for size in wanted]
    return [*dict.fromkeys(found)]


def total_bytes(chosen: Choice) -> int:
    return sum(option.bytes for option in chosen.values())


def total_kl(chosen: Choice) -> float:
    return sum(option.kl for option in chosen.values())


def _upgrades(units: Sequence[Unit]) -> list[tuple[Unit, Option]]:
    """Steps from the smallest option to larger ones, those that remove most per byte first.

    A unit's steps go along the lower convex hull of its options, so that each removes less per byte than the one
    before, and comes after it here.
    """
    steps = []
    for unit in units:
        at = unit.smallest
        while better := [option for option in unit.options if option.bytes > at.bytes and option.kl < at.kl]:
            gains = [((at.kl - option.kl) / (option.bytes - at.bytes), option.bytes, option) for option in better]
            gain, _, at = max(gains, key=lambda each: each[:2])
            steps.append((gain, unit, at))
    return [(unit, option) for _, unit, option in sorted(steps, key=lambda step: -step[0])]


def _others(units: Sequence[Unit]) -> list[tuple[Unit, Option]]:
    """All larger options, those that remove most first: they fill room that the steps along the hulls leave."""
    larger = [(unit, option) for unit in units for option in unit.options if option.kl < unit.smallest.kl]
    return sorted(larger, key=lambda each: each[1].kl - each[0].smallest.kl)


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
