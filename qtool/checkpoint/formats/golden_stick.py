"""golden-stick: what MindSpore Golden Stick (mindspore-gs 1.4.1) writes.

Per static layer (`W8A8`): `weight` int8 [out, in]; `weight_scale` float32 [out]; `weight_offset` int32 [out], zeros;
`input_scale` [in], one value repeated, in the model's dtype; `input_offset` int8 [in]; `deq_scale` float32 [out] =
input_scale · weight_scale; `quant_bias` int32 [out] = -Σ_in input_offset · weight; the layer's own `bias` apart.
The runtime computes q = clip(round(x / input_scale) + input_offset), y = (q·Wᵀ + quant_bias) · deq_scale (+ bias).
Per dynamic layer (`W8A8_DYNAMIC`): weight, weight_scale, weight_offset, bias. Those of 4 bits are in `nibbles`.

The runtime holds input_scale in the model's dtype, so a bfloat16 model quantizes with the rounded scale:
deq_scale is made from that one, and `storable_scale` gives it to whoever chooses zero point and integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats import nibbles
from qtool.checkpoint.formats.base import Description
from qtool.checkpoint.formats.described import (
    DescribedFormat,
    group_size,
    with_hidden_bias,
    word,
    zero_point_correction,
)
from qtool.checkpoint.formats.scales import check_scales
from qtool.checkpoint.formats.stored import Stored
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W4A8, W8A8, W8A8_DYNAMIC, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

DESCRIPTION = "quantization_description.json"
_ASKED = "DeepseekV3ForCausalLM"


class GoldenStick(DescribedFormat):
    name = "golden-stick"
    title = "W8A8 and W4A8 of MindSpore Golden Stick"
    schemes = (W8A8, W8A8_DYNAMIC, W4A8)
    files = (DESCRIPTION,)
    # MindFormers 1.7.0 loads both into the decoder's last norm (models/deepseek3/utils.py, weight_mapping), a file's
    # tensors by their names: of one file, model.norm is what stays; of two, which file the folder happens to list last.
    together = ("model.layers.61.shared_head.norm.weight", "model.norm.weight")

    def shard_name(self, i: int, n: int) -> str:
        return f"quant-model-{i:05d}-of-{n:05d}.safetensors"

    def index_name(self, n: int) -> str | None:
        return "model.safetensors.index.json"

    def expresses(self, scheme: Scheme) -> bool:
        return super().expresses(scheme) and (scheme.weights.num_bits == 8 or scheme.weights.group_size is not None)

    def misfit(self, name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
        if nibbles.has(scheme) and shape[1] == scheme.weights.group_size:
            return f"{nibbles.WORD} of {self.name} has several groups in {shape[1]} channels"  # or MindFormers errs
        return super().misfit(name, shape, scheme)

    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        if nibbles.has(scheme):
            return scheme.weights.nbytes(shape) + 4 * math.prod(scheme.weights.scales_shape(shape))
        rows, columns = shape
        return scheme.weights.nbytes(shape) + 4 * rows + (8 * rows + 5 * columns if scheme.is_static else 0)

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        check_scales(name, linear)
        out_size, in_size = linear.weight.shape
        bias = {} if linear.bias is None else {f"{name}.bias": linear.bias.to(dtype)}
        if nibbles.has(linear.scheme):
            bits = nibbles.as_bits(linear.weight_scale.float())
            return {f"{name}.weight": nibbles.packed(linear.weight), f"{name}.weight_scale": bits, **bias}
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
                "quant_bias": zero_point_correction(linear),
            }
        return {**{f"{name}.{part}": tensor for part, tensor in tensors.items()}, **bias}

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        # Every parameter of a layer, its bias too, gets the layer's type: vLLM-MindSpore refuses a mixture.
        types = {**group_size(schemes), **{name: word(schemes.get(name.rpartition(".")[0])) for name in names}}
        # What config.json says would take the place of the description file in vLLM, so it says nothing but where it
        # must: MindFormers 1.7.0 lays out DeepSeek's cache by it (modeling_deepseek_v3_infer.py, use_fused_mla), and
        # updates it from the description (quantization/utils.py).
        asked = _ASKED in (config.get("architectures") or ())
        return Description({"quant_method": self.name} if asked else None, {DESCRIPTION: types})

    def group_size(self, checkpoint: Checkpoint, name: str) -> object:
        said, scales = super().group_size(checkpoint, name), f"{name}.weight_scale"
        if said is not None or scales not in checkpoint:
            return said
        # mindspore-gs 1.4.1 leaves it out.
        found, weight = checkpoint.info(scales).shape, checkpoint.info(f"{name}.weight").shape
        fit = len(found) == len(weight) == 2 and found[1] and weight[1] % found[1] == 0
        return weight[1] // found[1] if fit else None

    def read(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        if nibbles.has(scheme):
            return self._of_four_bits(stored, scheme)
        linear = self.read_parts(stored, scheme)
        return with_hidden_bias(stored, linear, known=None) if scheme.is_static else linear

    def _of_four_bits(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        bits = stored.checkpoint.tensor(f"{stored.name}.weight_scale")
        wanted = scheme.weights.scales_shape(self.shape(stored, scheme))
        if bits.dtype.itemsize != 8 or bits.dtype.is_floating_point or bits.shape != wanted:
            raise stored.error(f"weight_scale is {bits.dtype} {list(bits.shape)}, expected uint64 {list(wanted)}")
        scale = nibbles.of_bits(bits)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise stored.error("weight_scale holds a number that is not positive and finite")
        return QuantizedLinear(scheme, nibbles.unpacked(stored), scale, stored.bias())
