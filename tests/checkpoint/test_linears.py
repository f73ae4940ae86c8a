"""What a writer remembers of its layers, through a journal's JSON and back."""

from __future__ import annotations

import json

import pytest

from qtool.checkpoint.linears import Linears
from qtool.errors import QtoolError
from qtool.scheme import W8A8, W8A8_DYNAMIC, QuantizationArgs, Scheme

BLOCKS = Scheme(QuantizationArgs(type="float", strategy="block", block_structure=(128, 128)), None)
GROUPS = Scheme(QuantizationArgs(num_bits=4, strategy="group", group_size=32), W8A8_DYNAMIC.activations)


def test_every_scheme_is_restored() -> None:
    first = Linears()
    first.add("a", W8A8, (0.5, -3))
    first.add("b", W8A8_DYNAMIC)
    state = json.loads(json.dumps(first.state()))
    assert state == {"a": ["W8A8", 0.5, -3], "b": ["W8A8-dynamic", None, None]}
    first.add("c", None)
    first.add("d", BLOCKS)
    first.add("e", GROUPS)
    second = Linears()
    for each in (state, json.loads(json.dumps(first.state()))):
        second.restore(each)
    assert second.schemes == first.schemes == {"a": W8A8, "b": W8A8_DYNAMIC, "c": None, "d": BLOCKS, "e": GROUPS}
    assert second.state() == {}


def test_fused_siblings_agree_after_a_restore() -> None:
    first, second = Linears(), Linears()
    first.add("x.self_attn.q_proj", W8A8, (0.5, -3))
    second.restore(first.state())
    second.add("y.self_attn.k_proj", W8A8, (0.25, -3))
    with pytest.raises(QtoolError, match="differ from"):
        second.add("x.self_attn.k_proj", W8A8, (0.25, -3))
