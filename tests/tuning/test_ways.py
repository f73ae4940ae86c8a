"""The precisions that are compared: those that a runtime reads, each as `quantize` would do it."""

from __future__ import annotations

import pytest

from qtool import runtimes
from qtool.checkpoint import formats
from qtool.recipe.schema import Policy
from qtool.scheme import W4A16, W8A8_DYNAMIC
from qtool.tuning import ways

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.mark.parametrize(
    ("runtime", "format", "has", "lacks"),
    [
        ("vllm", "compressed-tensors", {"W8A8", "W8A8-dynamic", "W4A16", "FP8-dynamic"}, {"W8A16", "FP8-block"}),
        ("transformers", "compressed-tensors", {"W8A8-dynamic", "W4A16", "W4A8"}, {"W8A16", "FP8-block"}),
        ("llama-cpp", "compressed-tensors", {"W8A8-dynamic", "W4A16"}, {"W8A8", "W8A8-asymmetric", "FP8-dynamic"}),
        ("vllm-ascend", "modelslim", {"W8A8", "W8A8-dynamic"}, {"FP8-dynamic"}),
    ],
)
def test_what_a_runtime_reads(runtime: str, format: str, has: set[str], lacks: set[str]) -> None:
    found = set(ways.precisions(runtimes.get(runtime), formats.get(format), LLAMA))
    assert has <= found
    assert not lacks & found


def test_groups_fit_all_linears() -> None:
    assert ways.group_size([4096, 14336]) == 128
    assert ways.group_size([576, 1536]) == 64
    assert ways.group_size([160, 64]) == 32
    assert ways.group_size([72]) is None


def test_each_precision_everywhere() -> None:
    own = Policy.model_validate({"layers": ".*", "scheme": "W8A8", "clip": False, "rounding": "nearest"})
    other = Policy.model_validate({"layers": ".*", "weights": {"num_bits": 6}})
    found = ways.of_precisions({"a": own, "b": other, "c": None}, ["W8A8", "W8A8-dynamic", "W4A16"], 64)
    assert list(found) == ["W8A8 static", "W8A8 dynamic", "W4A16 in groups of 64", "as in the scheme"]
    assert found["W8A8 static"]["a"] is own  # whatever else it says
    assert found["as in the scheme"] == {"a": None, "b": other, "c": None}
    for way in found.values():
        assert way["c"] is None
    four = found["W4A16 in groups of 64"]["a"]
    assert four is not None
    assert (four.scheme.weights.num_bits, four.scheme.weights.group_size) == (W4A16.weights.num_bits, 64)
    assert (four.clip, four.rounding) == (own.clip, own.rounding)
    dynamic = found["W8A8 dynamic"]["b"]
    assert dynamic is not None
    assert dynamic.scheme == W8A8_DYNAMIC
    assert ways.way_of("a", own, found) == "W8A8 static"
    assert ways.way_of("b", other, found) == "as in the scheme"


def test_without_a_size_that_fits_there_are_no_groups() -> None:
    policies = {"a": Policy(layers=".*")}
    assert list(ways.of_precisions(policies, ["W8A8-dynamic", "W4A16"], None)) == ["W8A8 dynamic"]
