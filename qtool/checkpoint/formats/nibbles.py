"""W4A8_DYNAMIC: int4 weights, two to a byte, as golden-stick and modelslim hold them for Ascend's kernels.

Both: `weight` int8 [out / 2, in], output channels 2i in the low bits and 2i + 1 in the high ones; and `group_size` in
the description, one for all layers.

modelslim, version 1.0.0: `weight_scale` float32 [out, 1]; where groups of input channels share a scale also
`weight_scale_second` [out, groups], which it is multiplied by (group_size is 0 without); offsets, zeros; and
`scale_bias` float32 [out, 1]: 8 times the sum of what a channel's integers stand for, which kernels that shift int4
take off. Layers that are split along their inputs have sixteen of these, [out, 16], for as many parts of the inputs
(msmodelslim, format/common/pack.py; vllm-ascend 0.23.0.post1, quantization/methods/w4a8.py). vllm-ascend keeps both
levels in the model's dtype and multiplies them. So the first is a power of two here, and the product is the scale
itself.

golden-stick: `weight_scale` uint64 [out, groups], the bits of a float32 (mindspore-gs 1.4.1, ptq/hal.py,
convert_fp32_to_uint64; mindformers 1.7.0, quantization/golden_stick/a8dynw4.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.checkpoint.formats.stored import Stored
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W4A8, QuantizationArgs, Scheme

if TYPE_CHECKING:
    import torch

WORD = "W4A8_DYNAMIC"
PARTS = frozenset(("weight_scale_second", "weight_offset_second", "scale_bias"))
_SPLIT = frozenset(("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "w2", "wo"))
_MOST_CARDS = 16  # that a layer is split over
_TOGETHER = 8  # output channels that a kernel's word holds


def has(scheme: Scheme) -> bool:
    """Whether a layer of this scheme can be written so."""
    weights = scheme.weights
    return (
        (weights.type, weights.num_bits, weights.symmetric) == ("int", 4, True)
        and weights.strategy in ("channel", "group")
        and scheme.activations == W4A8.activations
    )


def scheme(group_size: object) -> Scheme | None:
    """Of a description's group_size; None for what is none."""
    if group_size is None:
        group_size = 256  # vllm-ascend's default
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 0:
        return None
    if not group_size:
        return Scheme(QuantizationArgs(num_bits=4, strategy="channel"), W4A8.activations)
    return Scheme(QuantizationArgs(num_bits=4, strategy="group", group_size=group_size), W4A8.activations)


def misfit(name: str, shape: tuple[int, int]) -> str | None:
    """Why a layer of this shape (out, in) can't be written; None where it can."""
    out, width = shape
    if out % _TOGETHER:
        return f"{WORD} has {_TOGETHER} output channels in a word, and {out} are not a whole number of words"
    if _is_split(name) and width % _MOST_CARDS:
        return f"{WORD} splits its input over {_MOST_CARDS} cards, and {width} channels don't divide so"
    return None


def nbytes(shape: tuple[int, int], args: QuantizationArgs) -> int:
    """Of the tensors of a layer [out, in], but for its bias."""
    return args.nbytes(shape) + 12 * shape[0] + (4 * shape[0] * shape[1] // args.group_size if args.group_size else 0)


def packed(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out / 2, in] of int8 [out, in], in -8..7."""
    return (integers[::2] & 15) | (integers[1::2] << 4)


def unpacked(stored: Stored) -> torch.Tensor:
    """The inverse, of a layer's weight."""
    import torch

    weight = stored.weight()
    return torch.stack((weight << 4 >> 4, weight >> 4), dim=1).reshape(shape(stored))


def as_bits(scale: torch.Tensor) -> torch.Tensor:
    """uint64 of the same shape: the bits of each float32."""
    import torch

    return scale.contiguous().view(torch.int32).to(torch.int64).view(torch.uint64)


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    """The inverse, for 64-bit integers; zeros for what the bits of no float32 are."""
    import torch

    numbers = bits.view(torch.int64)
    inside = (numbers >= 0) & (numbers < 1 << 31)
    return torch.where(inside, numbers, 0).to(torch.int32).view(torch.float32)


def tensors(name: str, linear: QuantizedLinear) -> dict[str, torch.Tensor]:
    """modelslim's, by the last parts of their names."""
    import torch

    scale = linear.weight_scale.float().reshape(len(linear.weight), -1)
    found = {"weight": packed(linear.weight)}
    if linear.scheme.weights.group_size is None:
        first = scale
    else:
        first = torch.exp2(torch.floor(torch.log2(scale.amax(dim=1, keepdim=True))))
        second = scale / first
        found |= {"weight_scale_second": second, "weight_offset_second": torch.zeros_like(second)}
    parts = linear.dequantize().unflatten(1, (_MOST_CARDS if _is_split(name) else 1, -1))
    return {
        **found,
        "weight_scale": first,
        "weight_offset": torch.zeros_like(first),
        "scale_bias": 8 * parts.sum(dim=2, dtype=torch.float64).float(),
    }


def shape(stored: Stored) -> tuple[int, int]:
    """(out, in)."""
    rows, width = stored.shape
    return 2 * rows, width


def read(stored: Stored, scheme: Scheme) -> QuantizedLinear:
    """The inverse of `tensors`; whatever `scale_bias` says, which follows from the rest."""
    out, width = shape(stored)
    scale = stored.scale("weight_scale", out)
    stored.no_zero_point("weight_offset", out)
    if scheme.weights.group_size is not None:
        scale = scale[:, None] * stored.scales("weight_scale_second", scheme.weights, (out, width))
    return QuantizedLinear(scheme, unpacked(stored), scale, stored.bias())


def _is_split(name: str) -> bool:
    return name.rpartition(".")[2] in _SPLIT
