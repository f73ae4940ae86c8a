"""ggml's blocks, read back by the gguf library."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from qtool.gguf.blocks import block_type, pack, row_bytes
from qtool.scheme import QuantizationArgs


@pytest.mark.parametrize(("kind", "low", "high"), [("Q8_0", -128, 127), ("Q4_0", -8, 7)])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_gguf_library_reads_the_same_integers(kind: str, low: int, high: int, parts: int) -> None:
    generator = np.random.default_rng(0)
    integers = generator.integers(low, high + 1, (2, 5, 96)).astype(np.float32)
    scales = (generator.uniform(0.001, 0.02, (2, 5, parts)) * generator.choice([-1, 1], (2, 5, parts))).astype(
        np.float32
    )
    packed = pack(kind, integers, scales)
    assert packed.blocks.shape == (2, 5, row_bytes(kind, 96))
    halves = scales.astype(np.float16).astype(np.float32)
    expected = integers * np.repeat(halves, 96 // parts, axis=-1)
    read = gguf.quants.dequantize(packed.blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, expected)
    assert packed.scale_rounding == pytest.approx(np.max(np.abs((halves - scales) / scales)), rel=1e-6)
    assert 0 < packed.scale_rounding < 2**-10


@pytest.mark.parametrize(("kind", "number"), [("Q8_0", 128), ("Q8_0", 0.5), ("Q4_0", 8), ("Q4_0", -9)])
def test_what_is_no_integer_of_the_type_is_refused(kind: str, number: float) -> None:
    integers = np.zeros((3, 32), np.float32)
    integers[2, 31] = number
    with pytest.raises(ValueError, match="no integers from"):
        pack(kind, integers, np.ones((3, 1), np.float32))


def test_which_integers_have_blocks() -> None:
    assert block_type(QuantizationArgs(), 64) == "Q8_0"
    assert block_type(QuantizationArgs(num_bits=4), 64) == "Q4_0"
    assert block_type(QuantizationArgs(num_bits=4, strategy="group", group_size=64), 128) == "Q4_0"
    assert block_type(QuantizationArgs(), 48) is None  # not whole blocks
    assert block_type(QuantizationArgs(num_bits=4, strategy="group", group_size=16), 128) is None
    assert block_type(QuantizationArgs(symmetric=False), 64) is None
    assert block_type(QuantizationArgs(type="float"), 64) is None
