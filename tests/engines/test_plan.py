"""What a plan refuses before any work: recipes that a format, a model or a search can't follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint.formats import NAMES
from qtool.checkpoint.reader import Checkpoint
from qtool.engines import plan
from qtool.errors import InputError
from qtool.recipe.load import load
from qtool.recipe.policy import Policy
from qtool.recipe.schema import Recipe
from qtool.scheme import W8A8, W8A8_ASYMMETRIC, W8A8_DYNAMIC

LINEARS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def recipe(osl: Any = "fast", **policy: Any) -> Recipe:
    made = Policy.model_validate({"layers": ".*", **policy})
    return Recipe(name="mine", description="", default_scheme="s", schemes={"s": [made]}, osl=osl)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("weights", [{"num_bits": 4}, {"group_size": 32}, {"num_bits": 7, "strategy": "tensor"}])
def test_weights_that_no_format_has_a_place_for(
    make_model: Callable[..., Path], name: str, activations: str, weights: dict[str, Any]
) -> None:
    checkpoint = Checkpoint.open(make_model("llama"))
    if name == "compressed-tensors" and activations == "dynamic" and "strategy" not in weights:
        pytest.skip("it has a place for these")
    if name == "modelslim" and activations == "dynamic" and weights == {"num_bits": 4}:
        pytest.skip("it has a place for these, of experts")
    with pytest.raises(InputError, match="can't express W") as caught:
        plan.make(checkpoint, recipe(weights=weights, activations=activations), "s", name, LINEARS)
    assert "q_proj" in caught.value.what


def test_groups_that_do_not_divide_the_input_channels(make_model: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(make_model("llama"))
    width = checkpoint.info(f"{LINEARS[0]}.weight").shape[1]
    with pytest.raises(InputError, match=rf"q_proj: {width} input channels .* groups of 37"):
        plan.make(checkpoint, recipe(weights={"group_size": 37}), "s", "compressed-tensors", LINEARS)


def test_exact_osl_is_for_channels(make_model: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(make_model("llama"))
    with pytest.raises(InputError, match="osl: exact"):
        plan.make(checkpoint, recipe("exact", weights={"group_size": 32}), "s", "compressed-tensors", LINEARS)
    automatic = recipe("exact", activations={"mode": "dynamic", "symmetric": "auto"})
    for how in (recipe("exact"), automatic):
        made = plan.make(checkpoint, how, "s", "compressed-tensors", LINEARS)
        assert set(made.schemes.values()) == {W8A8_DYNAMIC}


ZERO_POINTS = {  # formats whose readers take a zero point per token
    "compressed-tensors": True,
    "golden-stick": False,
    "modelslim": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_point_per_token_where_the_format_has_it(make_model: Callable[..., Path], name: str) -> None:
    checkpoint = Checkpoint.open(make_model("llama"))
    wanted = recipe(activations={"mode": "dynamic", "symmetric": "auto"})
    made = plan.make(checkpoint, wanted, "s", name, LINEARS)
    expected = W8A8_ASYMMETRIC if ZERO_POINTS[name] else W8A8_DYNAMIC
    assert set(made.schemes.values()) == {expected}
    words = "W8A8 per-token dynamic" + (" asymmetric" if ZERO_POINTS[name] else "") + ", osl, clip, gptq"
    assert {plan.describe(policy) for policy in made.policies.values()} == {words}
    simple = plan.make(checkpoint, wanted, "s", name, LINEARS, symmetric=True)
    assert set(simple.schemes.values()) == {W8A8_DYNAMIC}


@pytest.mark.parametrize("name", [name for name, has in ZERO_POINTS.items() if not has])
def test_a_zero_point_that_is_asked_for_is_not_dropped(make_model: Callable[..., Path], name: str) -> None:
    wanted = recipe(activations={"mode": "dynamic", "symmetric": False})
    with pytest.raises(InputError, match="can't express W8A8 dynamic asymmetric"):
        plan.make(Checkpoint.open(make_model("llama")), wanted, "s", name, LINEARS)


def test_experts_have_none_in_the_default_recipe() -> None:
    # vLLM 0.32's int8 experts (compressed_tensors_moe_w8a8_int8.py) quantize symmetrically whatever config.json says.
    default = load("default")
    expected = {
        "mlp.experts.7.up_proj": W8A8_DYNAMIC,
        "mlp.shared_experts.up_proj": W8A8_ASYMMETRIC,
        "mlp.up_proj": W8A8_ASYMMETRIC,
        "self_attn.q_proj": W8A8,
    }
    for name, scheme in expected.items():
        policy = default.policy("w8a8", f"model.layers.3.{name}")
        assert policy is not None
        assert policy.settled(lambda _: True).scheme == scheme


def test_a_policy_in_words() -> None:
    assert plan.describe(recipe().schemes["s"][0]) == "W8A8 per-token dynamic, osl, clip, gptq"
    static = Policy.model_validate(
        {"layers": "x", "activations": {"mode": "static", "observer": "mse"}, "clip": False, "rounding": "nearest"}
    )
    assert plan.describe(static) == "W8A8 per-tensor static (mse), osl, nearest"
    groups = Policy.model_validate({"layers": "x", "weights": {"num_bits": 4, "group_size": 128}, "smoothing": "none"})
    assert plan.describe(groups) == "W4A8 by group of 128 per-token dynamic, clip, gptq"
    unquantized = Policy.model_validate({"layers": "x", "scheme": "W4A16"})
    assert plan.describe(unquantized) == "W4A16 by group of 128, osl, clip, gptq"


def test_every_recipe_has_the_usual_precisions_for_its_layers() -> None:
    mine = Recipe(
        name="mine",
        description="",
        default_scheme="s",
        schemes={
            "s": [
                Policy.model_validate({"layers": ".*router", "quantize": False}),
                Policy.model_validate({"layers": ".*", "clip": False, "smoothing": "none"}),
            ]
        },
    )
    found = mine.with_scheme("w4a16-g32")
    assert found is not None
    assert found.policy("w4a16-g32", "a.router") is None
    policy = found.policy("w4a16-g32", "a.up_proj")
    same = {"layers": ".*", "clip": False, "smoothing": "none"}
    assert policy == Policy.model_validate({**same, "scheme": "w4a16-g32"})
    assert mine.with_scheme("s") is mine
    assert mine.with_scheme("w16") is None
