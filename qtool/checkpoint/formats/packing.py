"""Integers of a few bits in int32 words, as compressed-tensors 0.17 packs them (compressors/pack_quantized/helpers.py).

A word holds 32 / num_bits neighbours of a row, the first in its lowest bits, each plus 2^(num_bits - 1) so that none is
negative. The last word of a row is filled with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WIDTHS = (2, 4, 8)
"""Numbers of bits that fill a word. With others vLLM 0.32 and compressed-tensors 0.17 disagree on a row's words."""


def words(width: int, num_bits: int) -> int:
    """Of a row of so many integers."""
    return -(-width // (32 // num_bits))


def pack(integers: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int8 [out, in], in the range of `num_bits`, as int32 [out, words]."""
    import torch

    width = integers.shape[1]
    per_byte = 8 // num_bits
    codes = integers.to(torch.uint8).add_(1 << (num_bits - 1))  # modulo 256; the bits above are masked
    codes.bitwise_and_((1 << num_bits) - 1)
    missing = words(width, num_bits) * (32 // num_bits) - width
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    packed = codes[:, ::per_byte].clone(memory_format=torch.contiguous_format)
    for place in range(1, per_byte):
        packed.bitwise_or_(codes[:, place::per_byte] << (place * num_bits))
    return packed.view(torch.int32)  # the lowest byte comes first, as in the file


def unpack(packed: torch.Tensor, num_bits: int, width: int) -> torch.Tensor:
    """The inverse: int8 [out, width] of int32 [out, words]."""
    import torch

    per_byte = 8 // num_bits
    codes = packed.contiguous().view(torch.uint8)
    out = torch.empty(len(codes), codes.shape[1] * per_byte, dtype=torch.uint8, device=packed.device)
    mask = (1 << num_bits) - 1
    for place in range(per_byte):
        out[:, place::per_byte] = (codes >> (place * num_bits)) & mask
    return out[:, :width].sub_(1 << (num_bits - 1)).view(torch.int8).contiguous()
