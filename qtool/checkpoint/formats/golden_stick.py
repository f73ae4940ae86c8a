"""golden-stick: written by MindSpore Golden Stick (mindspore-gs 1.4.1), read by vLLM-MindSpore 0.5.1.

Per static layer (`W8A8`): `weight` int8 [out, in]; `weight_scale` float32 [out]; `weight_offset` int32 [out], zeros;
`input_scale` [in], one value repeated, in the model's dtype; `input_offset` int8 [in]; `deq_scale` float32 [out] =
input_scale · weight_scale; `quant_bias` int32 [out] = -Σ_in input_offset · weight; the layer's own `bias` apart.
The runtime computes q = clip(round(x / input_scale) + input_offset), y = (q·Wᵀ + quant_bias) · deq_scale (+ bias).
Per dynamic layer (`W8A8_DYNAMIC`): weight, weight_scale, weight_offset, bias.

The runtime holds input_scale in the model's dtype, so a bfloat16 model quantizes with the rounded scale:
deq_scale is made from that one, and `storable_scale` gives it to whoever chooses offset and integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.common import Description, Format, Mode, Stored, check_scales
from qtool.checkpoint.reader import GOLDEN_STICK_DESCRIPTION
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W8A8, W8A8_DYNAMIC

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

TYPES: dict[Mode, str] = {"static": "W8A8", "dynamic": "W8A8_DYNAMIC", "float": "FLOAT"}


class GoldenStick(Format):
    name = "golden-stick"

    def shard_name(self, i: int, n: int) -> str:
        return f"quant-model-{i:05d}-of-{n:05d}.safetensors"

    def index_name(self, n: int) -> str | None:
        return "model.safetensors.index.json"

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        check_scales(name, linear)
        out_size, in_size = linear.weight.shape
        tensors = {
            "weight": linear.weight,
            "weight_scale": linear.weight_scale.float(),
            "weight_offset": torch.zeros(out_size, dtype=torch.int32),
        }
        if linear.input_scale is not None and linear.input_zero_point is not None:
            scale = self.storable_scale(linear.input_scale, dtype)
            tensors |= {
                "input_scale": torch.full((in_size,), scale, dtype=dtype),
                "input_offset": torch.full((in_size,), linear.input_zero_point, dtype=torch.int8),
                "deq_scale": torch.tensor(scale, dtype=torch.float32) * linear.weight_scale.float(),
                "quant_bias": offset_correction(linear),
            }
        if linear.bias is not None:
            tensors["bias"] = linear.bias.to(dtype)
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    def describe(self, names: Sequence[str], linears: Mapping[str, Mode], config: Mapping[str, Any]) -> Description:
        # Every parameter of a layer, its bias too, gets the layer's type: vLLM-MindSpore refuses a mixture.
        types = {name: TYPES[linears.get(name.rpartition(".")[0], "float")] for name in names}
        return Description(None, {GOLDEN_STICK_DESCRIPTION: types})

    def mode(self, checkpoint: Checkpoint, name: str) -> Mode | None:
        return described_mode(checkpoint, name)

    def read(self, stored: Stored, mode: Mode) -> QuantizedLinear:
        linear = read_described(stored, mode)
        return with_hidden_bias(stored, linear, known=None) if linear.is_static else linear

    def inputs(self, stored: Stored) -> tuple[float, int]:
        return described_inputs(stored)


def offset_correction(linear: QuantizedLinear) -> torch.Tensor:
    """int32 [out]: -input_zero_point · the sum of each output channel's int8 weights."""
    import torch

    assert linear.input_zero_point is not None
    return -linear.input_zero_point * linear.weight.sum(dim=1, dtype=torch.int32)


def described_mode(checkpoint: Checkpoint, name: str) -> Mode | None:
    """What the description file says of a layer; layers that it doesn't mention are float."""
    kind = checkpoint.description.get(f"{name}.weight", TYPES["float"])
    return next((mode for mode, known in TYPES.items() if known == kind), None)


def read_described(stored: Stored, mode: Mode) -> QuantizedLinear:
    """One layer of a checkpoint that keeps the parameters golden-stick and modelslim have in common."""
    import torch

    weight, bias = stored.weight(), stored.bias()
    out_size, _ = stored.shape
    stored.zero("weight_offset", out_size)
    if mode == "dynamic":
        return QuantizedLinear(W8A8_DYNAMIC, weight, stored.scale("weight_scale", out_size), bias)
    input_scale, input_zero_point = described_inputs(stored)
    if stored.has("weight_scale"):
        weight_scale = stored.scale("weight_scale", out_size)
    else:
        deq_scale = stored.vector("deq_scale", out_size)
        if deq_scale.dtype == torch.int64:  # the bits of a float32, as the float16 kernels want them
            deq_scale = deq_scale.to(torch.int32).view(torch.float32)
        weight_scale = deq_scale / input_scale
    return QuantizedLinear(W8A8, weight, weight_scale, bias, input_scale, input_zero_point)


def described_inputs(stored: Stored) -> tuple[float, int]:
    _, in_size = stored.shape
    return stored.input_scale(in_size), stored.offset("input_offset", in_size)


def with_hidden_bias(stored: Stored, linear: QuantizedLinear, known: torch.Tensor | None) -> QuantizedLinear:
    """A static layer with the bias that its quant_bias may hold beyond the correction of the input's zero point.

    `known` is the bias [out] that quant_bias is expected to hold, in the model's units. Without one, a layer that has
    no `bias` of its own gets what is there. Raises InputError when quant_bias and the rest contradict each other.

    msmodelslim computes quant_bias in float32, so it may be off by a rounding of the correction.
    """
    import torch

    if not stored.has("quant_bias"):
        return linear
    assert linear.input_scale is not None
    correction = offset_correction(linear).double()
    deq_scale = linear.weight_scale.double() * linear.input_scale
    held = stored.vector("quant_bias", len(correction)).double() - correction
    expected = torch.zeros_like(held) if known is None else known.double() / deq_scale
    if bool(((held - expected).abs() <= 1 + correction.abs() * 2**-22 + expected.abs() * 2**-22).all()):
        return linear
    if linear.bias is not None:
        raise stored.error("quant_bias does not fit the weight, the input's zero point and the bias")
    return dataclasses.replace(linear, bias=(held * deq_scale).float())
