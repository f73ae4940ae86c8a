"""modelslim: AscendV1 of msmodelslim, version 1.0.0.

As golden-stick, but `input_scale` and `input_offset` are [1], `weight_scale` and `weight_offset` [out, 1], all float32.
The runtime ignores a static layer's own bias, so `quant_bias` carries it too, in units of deq_scale: int32 [out] =
round(bias / deq_scale) - Σ_in input_offset · weight; `bias` stays in the file as FLOAT. In models that are not
bfloat16 `deq_scale` is the float32's bits as int64, as the kernels for float16 want it.

A runtime holds input_scale, and the weight_scale of dynamic layers, in the model's dtype: `storable_scale` and
`storable_weight_scale` give what it will compute with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats.base import Description
from qtool.checkpoint.formats.described import TYPES, DescribedFormat, with_hidden_bias, zero_point_correction
from qtool.checkpoint.formats.scales import check_scales
from qtool.checkpoint.formats.stored import Stored
from qtool.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear

DESCRIPTION = "quant_model_description.json"


class ModelSlim(DescribedFormat):
    name = "modelslim"
    title = "W8A8 of msmodelslim (AscendV1)"
    files = (DESCRIPTION,)
    config_keys = ("quantization_config", "quantize")  # the latter is MindIE's mark

    def shard_name(self, i: int, n: int) -> str:
        return f"quant_model_weights-{i:05d}-of-{n:05d}.safetensors"

    def index_name(self, n: int) -> str | None:
        return "quant_model_weights.safetensors.index.json"

    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        rows, _ = shape
        return scheme.weights.nbytes(shape) + 4 * rows + (12 * rows + 8 if scheme.is_static else 0)

    def storable_weight_scale(self, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
        import torch

        if scheme.is_static or dtype == torch.float16:  # float16's range is too short for small scales
            return scale
        return scale.to(dtype).float()

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        check_scales(name, linear)
        # quant_bias is made of the bias as stored: a reader can compare them only then.
        bias = None if linear.bias is None else linear.bias.to(dtype)
        weight_scale = linear.weight_scale.float().reshape(-1, 1)
        tensors = {
            "weight": linear.weight,
            "weight_scale": weight_scale,
            "weight_offset": torch.zeros_like(weight_scale),
        }
        if linear.input_scale is not None and linear.input_zero_point is not None:
            scale = torch.tensor([self.storable_scale(linear.input_scale, dtype)], dtype=torch.float32)
            deq_scale = scale * linear.weight_scale.float()
            quant_bias = zero_point_correction(linear)
            if bias is not None:
                quant_bias = quant_bias + (bias.double() / deq_scale.double()).round().to(torch.int32)
            tensors |= {
                "input_scale": scale,
                "input_offset": torch.tensor([float(linear.input_zero_point)]),
                "deq_scale": deq_scale if dtype == torch.bfloat16 else deq_scale.view(torch.int32).to(torch.int64),
                "quant_bias": quant_bias,
            }
        if bias is not None:
            tensors["bias"] = bias
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        present = set(schemes.values())
        types: dict[str, Any] = {
            "version": "1.0.0",
            "model_quant_type": TYPES[next((scheme for scheme in self.schemes if scheme in present), None)],
        }
        for name in names:
            owner, _, part = name.rpartition(".")
            types[name] = TYPES[None if part == "bias" else schemes.get(owner)]
        # A runtime asks for the type of lm_head even where it is tied to the embedding and not in the file.
        types.setdefault("lm_head.weight", TYPES[None])
        return Description(None, {DESCRIPTION: types})

    def read(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        linear = self.read_parts(stored, scheme)
        return with_hidden_bias(stored, linear, known=linear.bias) if scheme.is_static else linear
