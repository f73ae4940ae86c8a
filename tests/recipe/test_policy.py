"""Policies in all their spellings."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qtool.recipe.policy import Policy
from qtool.scheme import FP8_DYNAMIC, W8A8, W8A8_ASYMMETRIC, W8A8_DYNAMIC, QuantizationArgs, Scheme


def policy(**keys: Any) -> Policy:
    return Policy.model_validate({"layers": ".*", **keys})


# the spelling of the first version, and today's
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"smoothing": "osl"}, {"smoothing": {"method": "osl"}}),
        ({"smoothing": "none", "smoothquant_alpha": 0.5}, {"smoothing": {"method": "none"}}),
        (
            {"smoothing": "smoothquant", "smoothquant_alpha": 0.3},
            {"smoothing": {"method": "smoothquant", "alpha": 0.3}},
        ),
        ({"smoothing": "smoothquant"}, {"smoothing": {"method": "smoothquant", "alpha": 0.5}}),
        ({"smoothquant_alpha": 0.3}, {}),
        ({"rounding": "nearest"}, {"rounding": {"method": "nearest"}}),
        ({"activations": {"mode": "dynamic", "observer": "minmax", "percentile": 99.99}}, {}),
        ({"activations": {"observer": "minmax"}}, {"activations": {"mode": "dynamic"}}),
        (
            {"activations": {"mode": "static", "observer": "minmax", "percentile": 99.99}},
            {"activations": {"mode": "static", "observer": {"method": "minmax"}}},
        ),
        ({"activations": {"mode": "static", "percentile": 99.0}}, {"activations": {"mode": "static"}}),
        (
            {"activations": {"mode": "static", "observer": "percentile", "percentile": 99.5}},
            {"activations": {"mode": "static", "observer": {"method": "percentile", "percentile": 99.5}}},
        ),
        (
            {"activations": {"mode": "static", "observer": "percentile"}},
            {"activations": {"mode": "static", "observer": {"method": "percentile", "percentile": 99.99}}},
        ),
        (
            {"activations": {"mode": "static", "observer": "mse"}},
            {"activations": {"mode": "static", "observer": {"method": "mse"}}},
        ),
    ],
)
def test_earlier_spellings(old: dict[str, Any], new: dict[str, Any]) -> None:
    given = dict(old)
    assert policy(**old) == policy(**new)
    assert old == given


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"quantize": False},
        {"activations": "static"},
        {"activations": {"mode": "static", "observer": {"method": "percentile", "percentile": 98.0}}},
        {"smoothing": {"method": "smoothquant", "alpha": 0.25}, "clip": False, "rounding": "nearest"},
        {"scheme": "W8A8"},
        {"weights": {"num_bits": 4, "group_size": 32}},
        {"weights": {"num_bits": 3, "strategy": "tensor"}, "smoothing": "none"},
        {"activations": "float"},
        {"scheme": "w4a16-g64"},
        {"scheme": "w4a16-asymmetric"},
        {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}, "activations": "float"},
        {"scheme": "fp8-block"},
        {"weights": {"type": "float"}, "activations": {"type": "float", "group_size": 64}},
    ],
)
def test_what_is_dumped_loads_again(keys: dict[str, Any]) -> None:
    made = policy(**keys)
    for options in ({}, {"exclude_unset": True}, {"exclude_defaults": True}):
        assert Policy.model_validate(made.model_dump(mode="json", **options)) == made  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "scheme"),
    [
        ({}, W8A8_DYNAMIC),
        ({"activations": {"mode": "static", "observer": "mse"}}, W8A8),
        ({"scheme": "W8A8"}, W8A8),
        ({"scheme": "W8A8-dynamic", "smoothing": "none"}, W8A8_DYNAMIC),
        (
            {"weights": {"num_bits": 4, "group_size": 128}},
            Scheme(QuantizationArgs(num_bits=4, strategy="group", group_size=128), W8A8_DYNAMIC.activations),
        ),
        (
            {"weights": {"strategy": "tensor"}, "activations": "static"},
            Scheme(QuantizationArgs(strategy="tensor"), W8A8.activations),
        ),
    ],
)
def test_the_scheme_of_a_policy(keys: dict[str, Any], scheme: Scheme) -> None:
    assert policy(**keys).scheme == scheme


def test_with_mode() -> None:
    static = policy(activations={"mode": "static", "observer": "mse"}, clip=False)
    assert static.with_mode("static") is static
    assert static.with_mode("dynamic") == policy(activations="dynamic", clip=False)
    assert policy(clip=False).with_mode("static") == policy(activations="static", clip=False)


@pytest.mark.parametrize("observer", ["mse", "percentile", {"method": "mse"}])
@pytest.mark.parametrize("mode", ["dynamic", "float"])
def test_an_observer_is_for_a_static_range(mode: str, observer: Any) -> None:
    with pytest.raises(ValidationError, match="observer"):
        policy(activations={"mode": mode, "observer": observer})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": {"type": "float", "group_size": 32}}, "channel or block"),
        ({"weights": {"type": "float", "num_bits": 4}}, "of type: float is 8"),
        ({"weights": {"block_structure": [2, 2]}}, "is for type: float"),
        ({"weights": {"type": "float", "strategy": "block"}}, "is missing"),
        ({"weights": {"type": "float", "strategy": "channel", "block_structure": [2, 2]}}, "no meaning"),
        ({"weights": {"type": "float", "block_structure": [0, 2]}}, "greater than 0"),
        ({"activations": {"mode": "dynamic", "group_size": 32}}, "is for type: float"),
        ({"weights": {"type": "float"}, "smoothing": "osl"}, "osl is for integers"),
        ({"scheme": "FP8-dynamic", "clip": True}, "is for integers"),
    ],
)
def test_what_floating_point_has_no_place_for(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        policy(**keys)


def test_floating_point_is_neither_smoothed_nor_clipped() -> None:
    for made in (policy(scheme="fp8-dynamic"), policy().with_scheme(FP8_DYNAMIC)):
        assert (made.scheme, made.smoothing.method, made.clip, made.rounding.method) == (
            FP8_DYNAMIC,
            "none",
            False,
            "gptq",
        )


def test_what_is_left_to_calibration_is_settled_by_what_can_be_said() -> None:
    """`mode: auto` stays where the engine decides it and the format has both ways; else it is the one that can be."""
    left_open = policy(activations="auto")
    everything = left_open.settled(lambda scheme: True, measures=True)
    assert everything.activations.model_dump() == {"mode": "auto", "symmetric": False}
    assert [way.scheme for way in everything.ways] == [W8A8, W8A8_ASYMMETRIC]
    symmetric = left_open.settled(lambda scheme: scheme != W8A8_ASYMMETRIC, measures=True)
    assert [way.scheme for way in symmetric.ways] == [W8A8, W8A8_DYNAMIC]
    assert left_open.settled(lambda scheme: True).scheme == W8A8
    assert left_open.settled(lambda scheme: scheme == W8A8, measures=True).activations.mode == "static"
    dynamic = left_open.settled(lambda scheme: scheme == W8A8_DYNAMIC, measures=True)
    assert dynamic.scheme == W8A8_DYNAMIC


def test_static_activations_are_measured_unless_their_range_is_chosen_otherwise() -> None:
    assert policy(activations="static").measured().activations.mode == "auto"
    for other in (policy(activations={"mode": "static", "observer": "mse"}), policy(activations="dynamic")):
        assert other.measured() == other
