"""The search for the best smoothing scale, by the noise model that test_noise checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.quant.transforms import osl
from qtool.quant.transforms.diagonal import smoothing_scale
from qtool.scheme import W8A8_DYNAMIC, Scheme
from tests.quant.transforms.test_noise import SCHEMES, WIDTH, data, expected_error, noise_model


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_fit_beats_every_alpha(scheme: Scheme) -> None:
    x, weight = data()
    act_max, w_max = x.abs().amax(dim=0), weight.abs().amax(dim=0)
    found = osl.fit(noise_model(x, weight, scheme), act_max, w_max, torch.arange(WIDTH))
    by_alpha = []
    for step in range(20):
        s = act_max.double() ** (step / 20) / w_max.double() ** (1 - step / 20)
        by_alpha.append(float(expected_error(x.double(), weight.double(), s.log(), scheme)))
    assert expected_error(x.double(), weight.double(), found.s.double().log(), scheme) < 0.99 * min(by_alpha)


def test_fit_shares_s_among_channels_of_one_producer_channel() -> None:
    x, weight = data()
    channel_map = torch.arange(WIDTH) // 2
    act_max, w_max = (v.abs().amax(dim=0).view(-1, 2).amax(dim=1).repeat_interleave(2) for v in (x, weight))
    s = osl.fit(noise_model(x, weight, W8A8_DYNAMIC), act_max, w_max, channel_map).s
    assert torch.equal(s[::2], s[1::2])
    assert len(s.unique()) > 2


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 0.95])
def test_scale(alpha: float) -> None:
    x, weight = data()
    act_max, w_max = x.abs().amax(dim=0), weight.abs().amax(dim=0)
    act_max[3] = 0
    w_max[5] = 0
    act_max[7] = 1e-30
    with np.errstate(divide="ignore"):
        expected = np.maximum(act_max.double().numpy() ** alpha / w_max.double().numpy() ** (1 - alpha), 1e-5)
    expected[[3, 5]] = 1
    np.testing.assert_allclose(smoothing_scale(act_max, w_max, alpha).numpy(), expected, rtol=1e-5)
