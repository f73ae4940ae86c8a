"""Static or per-token activations by what they cost: against rounding carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qtool.quant.choice import MOST, decide
from qtool.quant.layer import smooth
from qtool.quant.statistics import InputStatistics
from qtool.quant.topology import Group, find_groups, linear_layers
from qtool.quant.weights import ModuleWeights
from qtool.recipe.policy import Auto, Policy

HEADS = 4
PLAIN = {"smoothing": "none", "rounding": "nearest", "clip": False}
AUTO = Policy.model_validate({"layers": ".*", "activations": "auto"})
DYNAMIC = Policy.model_validate({"layers": ".*", "activations": "dynamic"})


def policy(**keys: Any) -> Policy:
    return Policy.model_validate({"layers": ".*", "activations": {"mode": "auto", "symmetric": True}, **keys})


def statistics(x: torch.Tensor) -> InputStatistics:
    seen = InputStatistics(stride=1, with_hessian=False)
    seen.update(x)
    return seen


def rounded(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """255 steps from low to high, a whole number of which is 0."""
    step = (high - low) / 255
    zero = (-128 - low / step).round()
    return ((x / step + zero).round().clamp(-128, 127) - zero) * step


def true_cost(weight: torch.Tensor, x: torch.Tensor) -> float:
    """Squared output error with one range for all tokens over that with one for each, weights rounded in both."""
    steps = weight.abs().amax(dim=1, keepdim=True) * 2 / 255
    integers = (weight / steps).round().clamp(-128, 127) * steps
    largest = x.abs().amax(dim=1, keepdim=True)
    static, dynamic = rounded(x, x.min(), x.max()), rounded(x, -largest, largest)
    errors = [float((each @ integers.t() - x @ weight.t()).square().sum()) for each in (static, dynamic)]
    return errors[0] / errors[1]


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5, 1.0])
def test_the_cost_is_that_of_rounding_carried_out(spread: float) -> None:
    """Tokens of one size, and of sizes that differ by powers of e."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(256, 96, generator=generator) * 2 - 1
    x *= (spread * torch.randn(256, 1, generator=generator)).exp()
    fc = nn.Linear(96, 64)
    fc.weight.data = torch.randn(64, 96, generator=generator) / 10
    linear = nn.ModuleDict({"fc": fc})
    group, own = Group(("fc",)), policy(**PLAIN)
    decided = decide(ModuleWeights(linear), [group], {"fc": own}, {"fc": statistics(x)})
    truth = true_cost(fc.weight.detach(), x)
    assert decided.costs["fc"] == pytest.approx(truth, rel=0.15)
    chosen = decided.policies["fc"]
    assert chosen is not None
    assert chosen.activations.mode == ("static" if truth <= MOST else "dynamic")
    assert (chosen.activations.mode == "static") == (spread < 0.5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2", "phi", "gpt_neox"])
def test_what_is_found_on_the_way_is_what_the_chosen_policy_finds(
    architecture: str, decoder_layer: Callable[[str], Any]
) -> None:
    layer = decoder_layer(architecture)
    groups = find_groups(layer.module, layer.run, HEADS)
    observed = _observe(layer, groups)
    names = linear_layers(layer.module)
    # In Phi, the first linear of the MLP reads what q, k and v do.
    policies: dict[str, Policy | None] = {
        name: AUTO if "attn" in name or "attention" in name else DYNAMIC for name in names
    }
    weights = ModuleWeights(layer.module)
    decided = decide(weights, groups, policies, observed)
    assert decided.policies.keys() == policies.keys()
    for group in groups:
        kept = [decided.policies[name] for name in group.linears]
        before = [policies[name] for name in group.linears]
        assert {each.activations.mode for each, old in zip(kept, before, strict=True) if old == AUTO and each} in (
            set(),
            {"static" if decided.costs.get(group.linears[0], 0) <= MOST else "dynamic"},
        )
        assert all(each == DYNAMIC for each, old in zip(kept, before, strict=True) if old == DYNAMIC)
        assert (group.linears[0] in decided.costs) == (AUTO in before)
    alone = smooth(weights, groups, decided.policies, observed, torch.float32)[1]
    together = smooth(weights, groups, decided.policies, observed, torch.float32, decided.found)[1]
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name].s, together[name].s) for name in alone)


def test_a_group_that_nobody_left_open_stays_as_it_is() -> None:
    linear = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    decided = decide(ModuleWeights(linear), [Group(("fc",))], {"fc": DYNAMIC}, {"fc": statistics(torch.randn(4, 8))})
    assert (decided.policies, decided.found, decided.costs) == ({"fc": DYNAMIC}, {}, {})


def test_modes_without_a_choice_have_no_ways() -> None:
    assert isinstance(AUTO.activations, Auto)
    with pytest.raises(ValueError, match="dynamic"):
        _ = DYNAMIC.ways


def _observe(layer: Any, groups: list[Group]) -> dict[str, InputStatistics]:
    observed = {group.linears[0]: InputStatistics(stride=1, with_hessian=True) for group in groups}
    handles = [
        layer.module.get_submodule(name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(args[0]))
        for name, seen in observed.items()
    ]
    layer.run()
    for handle in handles:
        handle.remove()
    return observed
