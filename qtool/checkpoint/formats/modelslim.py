"""modelslim: AscendV1 of msmodelslim, version 1.0.0. Weights of 4 bits are in `nibbles`.

As golden-stick, but `input_scale` and `input_offset` are [1], `weight_scale` and `weight_offset` [out, 1], all float32.
The runtime ignores a static layer's own bias, so `quant_bias` carries it too, in units of deq_scale: int32 [out] =
round(bias / deq_scale) - Σ_in input_offset · weight; `bias` stays in the file as FLOAT. In models that are not
bfloat16 `deq_scale` is the float32's bits as int64, as the kernels for float16 want it.

Keys and values: `kv_cache_type` C8 says that the cache keeps int8, and `kv_cache_scale` and `kv_cache_offset` float32
[channels of all heads] of k_proj and v_proj how: q = clip(round(x / kv_cache_scale) + kv_cache_offset) (vllm-ascend
0.23.0.post1, quantization/methods/kv_c8.py, attention/attention_v1.py; MindIE's page on int8 caches).

A runtime holds input_scale, and the weight_scale of dynamic layers, in the model's dtype: `storable_scale` and
`storable_weight_scale` give what it will compute with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats import nibbles
from qtool.checkpoint.formats.base import CachingFormat, Description
from qtool.checkpoint.formats.described import (
    CACHE_TYPES,
    TYPES,
    DescribedFormat,
    group_size,
    unknown_scheme,
    with_hidden_bias,
    word,
    zero_point_correction,
)
from qtool.checkpoint.formats.scales import check_scales
from qtool.checkpoint.formats.stored import Stored
from qtool.quant.types import CacheScales, QuantizedCache
from qtool.scheme import INT8_CACHE, W4A8, W8A8, W8A8_DYNAMIC, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint
    from qtool.quant.types import QuantizedLinear

DESCRIPTION = "quant_model_description.json"
_VERSION = "1.0.0"
_SCALE, _OFFSET = "kv_cache_scale", "kv_cache_offset"


class ModelSlim(DescribedFormat, CachingFormat):
    name = "modelslim"
    title = "W8A8 and W4A8 of msmodelslim (AscendV1)"
    files = (DESCRIPTION,)
    schemes = (W8A8, W8A8_DYNAMIC, W4A8)
    parts = DescribedFormat.parts | nibbles.PARTS
    caches = (INT8_CACHE,)
    cache_parts = frozenset((_SCALE, _OFFSET))
    config_keys = ("quantization_config", "quantize")  # the latter is MindIE's mark

    def shard_name(self, i: int, n: int) -> str:
        return f"quant_model_weights-{i:05d}-of-{n:05d}.safetensors"

    def index_name(self, n: int) -> str | None:
        return "quant_model_weights.safetensors.index.json"

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        scheme = super().scheme(checkpoint, name)
        if scheme is not None and nibbles.has(scheme) and self.described(checkpoint).get("version") != _VERSION:
            raise unknown_scheme(checkpoint, name)  # an older version has an int4 in each byte
        return scheme

    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        if nibbles.has(scheme):
            return nibbles.nbytes(shape, scheme.weights)
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
        if nibbles.has(linear.scheme):
            found = nibbles.tensors(name, linear)
            found |= {} if linear.bias is None else {"bias": linear.bias.to(dtype)}
            return {f"{name}.{part}": tensor for part, tensor in found.items()}
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
        first = next((scheme for scheme in present if scheme is not None and nibbles.has(scheme)), None)
        first = first or next((scheme for scheme in self.schemes if scheme in present), None)
        types: dict[str, Any] = {"version": _VERSION, "model_quant_type": word(first), **group_size(schemes)}
        if any(name.endswith(f".{_SCALE}") for name in names):
            types[CACHE_TYPES[0]] = "C8"
        for name in names:
            owner, _, part = name.rpartition(".")
            types[name] = word(None if part == "bias" else schemes.get(owner))
        # A runtime asks for the type of lm_head even where it is tied to the embedding and not in the file.
        types.setdefault("lm_head.weight", TYPES[None])
        return Description(None, {DESCRIPTION: types})

    def cache_tensors(self, name: str, cache: QuantizedCache) -> dict[str, torch.Tensor]:
        tensors = {}
        for linear, scales in (("k_proj", cache.keys), ("v_proj", cache.values)):
            tensors[f"{name}.{linear}.{_SCALE}"] = scales.scale
            tensors[f"{name}.{linear}.{_OFFSET}"] = scales.zero_point
        return tensors

    def read_cache(self, checkpoint: Checkpoint, name: str) -> QuantizedCache | None:
        args = self.cache_scheme(checkpoint)
        if args is None:
            return None
        return QuantizedCache(
            args, *(_cache_scales(Stored(checkpoint, f"{name}.{each}")) for each in ("k_proj", "v_proj"))
        )

    def read(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        if nibbles.has(scheme):
            return nibbles.read(stored, scheme)
        linear = self.read_parts(stored, scheme)
        return with_hidden_bias(stored, linear, known=linear.bias) if scheme.is_static else linear


def _cache_scales(stored: Stored) -> CacheScales:
    offset = stored.checkpoint.tensor(f"{stored.name}.{_OFFSET}").reshape(-1).float()
    scale = stored.scale(_SCALE, len(offset))
    if bool((offset != offset.round()).any()) or bool(
        (offset < INT8_CACHE.qmin).any() | (offset > INT8_CACHE.qmax).any()
    ):
        raise stored.error(f"{_OFFSET} holds numbers that are no integers in {INT8_CACHE.qmin}..{INT8_CACHE.qmax}")
    return CacheScales(scale, offset)
