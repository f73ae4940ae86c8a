"""Rounding to nearest within bounds, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant.integer import symmetric_scale
from qtool.quant.rounding.nearest import clamp_rows, round_to_nearest
from qtool.scheme import QuantizationArgs

CHANNEL = QuantizationArgs()


def random_weight(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def test_clamp_rows() -> None:
    weight = random_weight(4, 9)
    bound = torch.tensor([0.1, 0.5, 1.0, 9.0])
    expected = np.clip(weight.numpy(), -bound.numpy()[:, None], bound.numpy()[:, None])
    np.testing.assert_array_equal(clamp_rows(weight, bound).numpy(), expected)


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.55, 127 / 127.5])
def test_integers_within_are_those_of_clamped_values(ratio: float) -> None:
    weight = random_weight(40, 90)
    bound = weight.abs().amax(dim=1) * ratio
    scale = symmetric_scale(bound, CHANNEL)
    clamped = np.clip(weight.numpy(), -bound.numpy()[:, None], bound.numpy()[:, None])
    expected = np.clip(np.round(clamped / scale.numpy()[:, None]), -128, 127)
    np.testing.assert_array_equal(round_to_nearest(weight, scale, bound, CHANNEL).numpy(), expected)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("signs", [1, -1])
def test_groups_of_few_bits(num_bits: int, signs: int) -> None:
    """A negative scale has the integers stand for the negative of the weight."""
    weight = random_weight(10, 24)
    args = QuantizationArgs(num_bits=num_bits, strategy="group", group_size=8)
    bound = weight.unflatten(1, (3, 8)).abs().amax(dim=2) * 0.9
    scale = symmetric_scale(bound, args)
    per_column, limit = scale.numpy().repeat(8, axis=1), bound.numpy().repeat(8, axis=1)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    expected = np.clip(np.round(np.clip(weight.numpy(), -limit, limit) / per_column), low, high)
    np.testing.assert_array_equal(round_to_nearest(signs * weight, signs * scale, bound, args).numpy(), expected)
