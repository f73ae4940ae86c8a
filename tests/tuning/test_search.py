"""Choosing under a limit, against every combination there is; and the recipe that says it."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import InputError
from qtool.recipe.schema import Policy, Recipe
from qtool.tuning.search import (
    FLOAT,
    Choice,
    Option,
    Unit,
    frontier,
    pattern,
    policies,
    thinned,
    total_bytes,
    total_kl,
    within_bytes,
    within_kl,
)
from qtool.tuning.tune import Goal


def unit(name: str, static: float, dynamic: float, size: int) -> Unit:
    ways = (Option("static", static, size), Option("dynamic", dynamic, size), Option(FLOAT, 0.0, 2 * size))
    return Unit((name,), ways)


def every_choice(units: list[Unit]) -> list[Choice]:
    return [dict(zip(units, options, strict=True)) for options in itertools.product(*(each.options for each in units))]


kl = st.floats(min_value=1e-6, max_value=1.0)


@given(st.lists(st.tuples(kl, kl), min_size=1, max_size=6), st.integers(min_value=0, max_value=12))
def test_the_best_of_all_choices_where_sizes_are_equal(pairs: list[tuple[float, float]], more: int) -> None:
    units = [unit(f"l{i}", static, dynamic, 10) for i, (static, dynamic) in enumerate(pairs)]
    most = 10 * (len(units) + more)
    allowed = [choice for choice in every_choice(units) if total_bytes(choice) <= most]
    found = within_bytes(units, most)
    assert total_bytes(found) <= most
    assert total_kl(found) == pytest.approx(min(map(total_kl, allowed)))


@given(st.lists(st.tuples(kl, kl, st.integers(1, 50)), min_size=1, max_size=5), st.floats(min_value=0.0, max_value=1.0))
def test_limits_hold(facts: list[tuple[float, float, int]], share: float) -> None:
    units = [unit(f"l{i}", static, dynamic, size) for i, (static, dynamic, size) in enumerate(facts)]
    least, most = (sum(size for *_, size in facts) * factor for factor in (1, 2))
    limit = round(least + share * (most - least))
    assert total_bytes(within_bytes(units, limit)) <= limit
    worst = sum(min(static, dynamic) for static, dynamic, _ in facts)
    found = within_kl(units, share * worst)
    assert total_kl(found) <= share * worst * (1 + 1e-9)
    for each, option in found.items():  # no step could have been left out
        if option.way == FLOAT:
            assert total_kl(found) + each.smallest.kl > share * worst


several = st.lists(st.lists(st.tuples(st.integers(1, 40), kl), min_size=1, max_size=4), min_size=1, max_size=4)


def many(facts: list[list[tuple[int, float]]]) -> list[Unit]:
    """Units of any precisions, and float, which costs nothing and more bytes than all."""
    return [
        Unit(
            (f"l{i}",), (*(Option(f"w{j}", cost, size) for j, (size, cost) in enumerate(ways)), Option(FLOAT, 0.0, 50))
        )
        for i, ways in enumerate(facts)
    ]


@given(several)
def test_no_choice_beats_the_frontier(facts: list[list[tuple[int, float]]]) -> None:
    """Each of its points has the least KL divergence of all choices of at most so many bytes."""
    units = many(facts)
    points = frontier(units)
    every = [(total_bytes(choice), total_kl(choice)) for choice in every_choice(units)]
    for point in points:
        assert point.kl == pytest.approx(min(cost for size, cost in every if size <= point.bytes), abs=1e-9)
    assert [point.bytes for point in points] == sorted(point.bytes for point in points)
    assert points[-1].kl == pytest.approx(0, abs=1e-9)
    assert {points[0], points[-1]} <= set(thinned(points, 3))
    assert len(thinned(points, 3)) <= 3


@given(several, st.floats(min_value=0.0, max_value=1.0))
def test_limits_hold_for_any_precisions(facts: list[list[tuple[int, float]]], share: float) -> None:
    units = many(facts)
    least = sum(each.smallest.bytes for each in units)
    limit = round(least + share * (50 * len(units) - least))
    found = within_bytes(units, limit)
    assert total_bytes(found) <= limit
    below = [point for point in frontier(units) if point.bytes <= limit]
    assert total_kl(found) <= below[-1].kl + 1e-9  # what is left of the room is used, too
    worst = sum(each.smallest.kl for each in units)
    found = within_kl(units, share * worst)
    assert total_kl(found) <= share * worst + 1e-9
    for each, option in found.items():  # no step back is left
        for other in each.options:
            if other.bytes < option.bytes:
                assert total_kl(found) - option.kl + other.kl > share * worst - 1e-9


def test_each_unit_takes_the_better_kind_of_activations() -> None:
    units = [unit("a", 0.2, 0.1, 10), unit("b", 0.1, 0.2, 10)]
    assert [option.way for option in within_bytes(units, 20).values()] == ["dynamic", "static"]


names = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.w1", "mlp.w1x")]


@given(st.sets(st.sampled_from(names), min_size=1))
def test_a_pattern_matches_its_names_and_no_others(chosen: set[str]) -> None:
    ordered = [name for name in names if name in chosen]
    regex = re.compile(pattern(ordered, names))
    assert [name for name in names if regex.fullmatch(name)] == ordered


def test_experts_of_a_layer_go_together() -> None:
    everything = [f"model.layers.{i}.mlp.experts.{e}.{part}_proj" for i in range(4) for e in range(8) for part in "ud"]
    everything += [f"model.layers.{i}.mlp.shared_experts.u_proj" for i in range(4)]
    for layers in ("1", "02", "0123"):
        chosen = [name for name in everything if name.split(".")[2] in layers and ".experts." in name]
        made = pattern(chosen, everything)
        assert [name for name in everything if re.fullmatch(made, name)] == chosen
        assert len(made) < 100


def test_a_name_without_numbers() -> None:
    assert pattern(["head.out"], ["head.out", "headxout"]) == r"head\.out"


def test_what_the_scheme_leaves_float_stays_it() -> None:
    """However alike all others are."""
    policy = Policy(layers="x")
    ways: dict[str, dict[str, Policy | None]] = {"static": {f"m.{i}.o": policy if i else None for i in range(4)}}
    units = [unit(f"m.{i}.o", 0.1, 0.2, 10) for i in range(1, 4)]
    made = policies({each: each.options[0] for each in units}, ways)
    recipe = Recipe(name="r", description="", default_scheme="s", schemes={"s": [Policy(**each) for each in made]})
    assert [recipe.policy("s", f"m.{i}.o") is not None for i in range(4)] == [False, True, True, True]


def test_policies_say_the_choice() -> None:
    units = [unit(f"m.{i}.o", 0.1, 0.2, 10) for i in range(3)]
    base = {f"m.{i}.o": Policy(layers="x", clip=False) for i in range(3)}
    static = {n: p.with_mode("static") for n, p in base.items()}
    chosen = dict(zip(units, (each.options[i] for i, each in enumerate(units)), strict=True))
    made = policies(chosen, {"static": static, "dynamic": base})
    recipe = Recipe(name="r", description="", default_scheme="s", schemes={"s": [Policy(**each) for each in made]})
    found = [recipe.policy("s", f"m.{i}.o") for i in range(3)]
    assert [policy and policy.activations.mode for policy in found] == ["static", "dynamic", None]
    assert [policy and policy.clip for policy in found] == [False, False, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("165MB", 165_000_000), ("1.5 GB", 1_500_000_000), ("123", 123), ("123B", 123), ("102%", 1020), ("2kB", 2000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert Goal(max_size=text).bytes(1000) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "1EB", "1 0", "%"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        Goal(max_size=text).bytes(1000)
