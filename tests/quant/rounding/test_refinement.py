"""Scales and integers in turn, against brute force."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from qtool.quant.rounding.clipping import Scales, ScaleSearch
from qtool.quant.rounding.errors import ErrorByEnergy
from qtool.quant.rounding.gptq import GPTQ
from qtool.quant.rounding.refinement import Refinement
from qtool.quant.types import dequantize
from qtool.scheme import QuantizationArgs
from tests.quant.rounding.test_gptq import problem


def stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.bfloat16).float()


def start(
    num_bits: int, group_size: int | None, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, Scales, Refinement]:
    """A weight, what GPTQ makes of it, and what refines that."""
    weight, _, hessian = problem(10, 96, 400)
    strategy: Literal["group", "channel"] = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=num_bits, strategy=strategy, group_size=group_size, symmetric=symmetric)
    gptq = GPTQ(hessian, 0.0, args, keep=True)
    search = ScaleSearch(args, (1.0, 0.9, 0.8), ErrorByEnergy(gptq.energy), stored, signed=symmetric)
    scales = search.of_rows(weight)
    assert gptq.hessian is not None
    integers = gptq.round(weight, scales.scale, scales.zero_point)
    return weight, integers, scales, Refinement(gptq.hessian, args, stored)


def errors(weight: torch.Tensor, integers: torch.Tensor, scales: Scales, refinement: Refinement) -> np.ndarray:
    made = dequantize(integers, scales.scale, refinement.args, scales.zero_point)
    delta = (made - weight).double().numpy()
    return np.einsum("ri,ij,rj->r", delta, refinement.hessian.double().numpy(), delta)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_no_row_errs_more_and_all_together_less(num_bits: int, group_size: int | None, symmetric: bool) -> None:
    weight, integers, scales, refinement = start(num_bits, group_size, symmetric)
    found, better = refinement(weight, integers, scales)
    before = errors(weight, integers, scales, refinement)
    after = errors(weight, found, better, refinement)
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.98 * before.sum()
    np.testing.assert_allclose(refinement.error(weight, found, better).numpy(), after, rtol=1e-3)
    assert found.dtype == torch.int8
    assert int(found.min()) >= refinement.args.qmin
    assert int(found.max()) <= refinement.args.qmax
    assert torch.equal(better.scale.sign(), scales.scale.sign())
    assert torch.equal(stored(better.scale), better.scale)
    assert (better.zero_point is None) == symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_least_squares(symmetric: bool) -> None:
    weight, integers, scales, refinement = start(4, 16, symmetric)
    exact = Refinement(refinement.hessian, refinement.args, lambda scale: scale)
    found = exact._fitted(weight, integers, scales).scale.double().numpy()
    root = np.linalg.cholesky(refinement.hessian.double().numpy())
    zeros = np.zeros((10, 6)) if scales.zero_point is None else scales.zero_point.double().numpy()
    for row in range(10):
        units = (integers[row].double().numpy().reshape(6, 16) - zeros[row][:, None])[:, :, None]
        columns = (units * root.reshape(6, 16, 96)).sum(axis=1).T  # of each scale: its part of the row, times the root
        expected, *_ = np.linalg.lstsq(columns, weight[row].double().numpy() @ root, rcond=None)
        np.testing.assert_allclose(found[row], expected, rtol=1e-3)


def test_in_the_end_no_integer_alone_is_better_elsewhere() -> None:
    weight, integers, scales, refinement = start(3, 16, symmetric=True)
    for _ in range(30):
        integers = refinement._descended(weight, integers, scales)
    least = errors(weight, integers, scales, refinement)
    for column in range(96):
        for step in (-1, 1):
            moved = integers.clone()
            moved[:, column] = (moved[:, column] + step).clamp(refinement.args.qmin, refinement.args.qmax)
            assert (errors(weight, moved, scales, refinement) >= least * 0.9999).all()


def test_what_is_exact_already_stays() -> None:
    weight, integers, scales, refinement = start(4, 16, symmetric=False)
    exact = dequantize(integers, scales.scale, refinement.args, scales.zero_point)
    found, better = refinement(exact, integers, scales)
    assert torch.equal(found, integers)
    assert torch.equal(better.scale, scales.scale)
    assert weight.shape == exact.shape
