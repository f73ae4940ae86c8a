"""Descriptions of precisions, against compressed-tensors' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs as TheirArgs

from qtool.scheme import PRESETS, W8A8, W8A8_DYNAMIC, QuantizationArgs, name_of


@pytest.mark.parametrize("name", PRESETS)
def test_compressed_tensors_takes_each_description_as_it_is(name: str) -> None:
    scheme = PRESETS[name]
    for args in filter(None, (scheme.weights, scheme.activations)):
        ours = {key: value for key, value in dataclasses.asdict(args).items() if value is not None}
        theirs = TheirArgs.model_validate(ours).model_dump(mode="json")
        assert QuantizationArgs(**{key: theirs[key] for key in ours}) == args


def test_ranges_of_integers() -> None:
    eight, four = QuantizationArgs(), QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    assert (eight.qmin, eight.qmax, eight.steps) == (-128, 127, 255)
    assert (four.qmin, four.qmax, four.steps) == (-8, 7, 15)


def test_static_and_dynamic_have_their_names() -> None:
    assert (W8A8.is_static, W8A8.label, name_of(W8A8)) == (True, "W8A8 static", "W8A8")
    assert (W8A8_DYNAMIC.is_static, W8A8_DYNAMIC.label, name_of(W8A8_DYNAMIC)) == (
        False,
        "W8A8 dynamic",
        "W8A8-dynamic",
    )


@pytest.mark.parametrize("wrong", [{"strategy": "group"}, {"group_size": 32}, {"strategy": "block"}])
def test_a_strategy_and_its_size_belong_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="strategy"):
        QuantizationArgs(**wrong)


@pytest.mark.parametrize(
    ("args", "scales", "nbytes"),
    [
        (QuantizationArgs(), (48,), 48 * 64 + 4 * 48),
        (QuantizationArgs(num_bits=4, strategy="group", group_size=32), (48, 2), 48 * 64 // 2 + 4 * 48 * 2),
        (QuantizationArgs(num_bits=3, strategy="tensor"), (1,), 48 * 64 * 3 // 8 + 4),
        (QuantizationArgs(type="float", strategy="block", block_structure=(32, 48)), (2, 2), 48 * 64 + 16),
    ],
)
def test_sizes_of_a_weight(args: QuantizationArgs, scales: tuple[int, ...], nbytes: int) -> None:
    assert (args.scales_shape((48, 64)), args.nbytes((48, 64))) == (scales, nbytes)


def test_groups_must_divide_the_input_channels() -> None:
    with pytest.raises(ValueError, match="64 input channels are not a whole number of groups of 48"):
        QuantizationArgs(strategy="group", group_size=48).nbytes((48, 64))
