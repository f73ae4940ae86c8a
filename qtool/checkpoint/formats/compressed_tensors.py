"""compressed-tensors.

Per layer: `weight_scale` [out, 1], or [out, groups] where groups of input channels have one each; with static
activations also `input_scale` [1] and `input_zero_point` int8 [1]; the layer's own `bias`; and the integers:

`int-quantized`: `weight` int8 [out, in].
`pack-quantized`: `weight_packed` int32 [out, words], several in a word, and `weight_shape` int64 [2], (out, in); with
zero points also `weight_zero_point` int32 [words, groups], those of neighbouring output channels in a word.
`float-quantized`: `weight` float8_e4m3fn [out, in]; where blocks share a scale, `weight_scale` has one for each.

Weights of 4 bits, and those beside float activations, are packed: vLLM 0.32 takes the latter only so, and the former
besides as int8 for ARM processors alone (compressed_tensors.py and kernels/linear/mixed_precision).

Which layer is which stands in config.json, as groups of targets: module names, regexes after `re:` that must match
from the start of a name, or a class of modules, Linear.

Keys and values: `kv_cache_scheme` says how they are kept, and `k_scale` and `v_scale` float32 [1] of an attention
module what a step is worth. vLLM 0.32 takes e4m3 alone (compressed_tensors.py, CompressedTensorsKVCacheMethod).

Scales: vLLM 0.32 holds them in float32, whatever it reads; transformers 5.19 (compressed-tensors 0.17) casts
them to the model's dtype. So that both compute with the same numbers, a scale is stored in the model's dtype
where that loses nothing, else in float32; `storable_scale` and `storable_weight_scale` give, for a bfloat16
model, the scales that lose nothing. (Float16's range is too short for small scales: such models keep float32.) Those
of packed weights are in the model's dtype in vLLM too, whatever that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool import patterns
from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.formats import fp4
from qtool.checkpoint.formats.base import (
    CachingFormat,
    Description,
    HuggingFaceFiles,
    PackedFormat,
    QuantizedFormat,
    UnknownScheme,
    quantization_method,
)
from qtool.checkpoint.formats.packing import WIDTHS, pack, unpack, words
from qtool.checkpoint.formats.scales import check_scales, round_to
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.formats.targets import has_usual_names, is_plain, targets
from qtool.errors import InputError
from qtool.quant.types import CacheScales, QuantizedCache, QuantizedLinear
from qtool.scheme import (
    FP8_BLOCK,
    FP8_CACHE,
    FP8_DYNAMIC,
    W4A8,
    W4A16,
    W4A16_ASYMMETRIC,
    W8A8,
    W8A8_ASYMMETRIC,
    W8A8_DYNAMIC,
    W8A16,
    QuantizationArgs,
    Scheme,
)

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.formats.packed import PackedWeight
    from qtool.checkpoint.reader import Checkpoint

_INT, _PACK, _FLOAT = "int-quantized", "pack-quantized", "float-quantized"
_PACKED, _SHAPE = "weight_packed", "weight_shape"
_ZERO_POINT, _ZERO_POINTS = "input_zero_point", "weight_zero_point"
_KEYS, _VALUES = "k_scale", "v_scale"
_SIZES = {"group": {"group_size"}, "block": {"block_structure"}}
_FLOAT_WEIGHTS = (FP8_DYNAMIC.weights, FP8_BLOCK.weights)
_FIELDS = tuple(field.name for field in dataclasses.fields(QuantizationArgs))


class CompressedTensors(HuggingFaceFiles, QuantizedFormat, PackedFormat, CachingFormat):
    name = "compressed-tensors"
    title = "integers and float8 of compressed-tensors"
    schemes = (W8A8, W8A8_DYNAMIC, W8A8_ASYMMETRIC, W8A16, W4A16, W4A16_ASYMMETRIC, W4A8, FP8_DYNAMIC, FP8_BLOCK)
    parts = frozenset(
        ("weight", _PACKED, _SHAPE, "weight_scale", _ZERO_POINTS, "input_scale", "input_zero_point", "bias")
    )
    caches = (FP8_CACHE,)
    # llm-compressor writes further ones, which say nothing for keys and values that are symmetric.
    cache_parts = frozenset((_KEYS, _VALUES, "q_scale", "k_zero_point", "v_zero_point", "q_zero_point"))
    weight_parts = ("weight", _PACKED)
    packed_parts = (parts - {"bias"}) | fp4.PARTS

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return quantization_method(config) == self.name

    def storable_scale(self, value: float, dtype: torch.dtype) -> float:
        return round_to(value, _scale_dtype(dtype))

    def expresses(self, scheme: Scheme) -> bool:
        weights = scheme.weights
        if weights.type == "float":
            return scheme in (FP8_DYNAMIC, FP8_BLOCK) or (scheme.activations is None and weights in _FLOAT_WEIGHTS)
        return scheme in (W8A8, W8A8_DYNAMIC, W8A8_ASYMMETRIC) or (
            (weights.type, weights.dynamic) == ("int", False)
            and weights.strategy in ("channel", "group")
            and weights.num_bits in WIDTHS
            and (scheme.activations is None or (weights.symmetric and scheme.activations == W8A8_DYNAMIC.activations))
        )

    def storable_weight_scale(self, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
        import torch

        if _is_packed(scheme) and dtype == torch.float16:
            return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()
        return scale.to(_scale_dtype(dtype)).float()

    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        return scheme.weights.nbytes(shape) + (5 if scheme.is_static else 0) + (16 if _is_packed(scheme) else 0)

    def misfit(self, name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
        blocks = scheme.weights.block_structure
        if blocks is None or not any(size % each for size, each in zip(shape, blocks, strict=True)):
            return None
        # compressed-tensors 0.17 divides a weight by the number of its scales; vLLM 0.32 refuses parts of blocks in
        # layers that it fuses.
        size, block = (" x ".join(map(str, each)) for each in (shape, blocks))
        return f"a weight of {size} is not a whole number of blocks of {block}, and runtimes read nothing else"

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        check_scales(name, linear)
        blocks = linear.scheme.weights.block_structure is not None
        scale = linear.weight_scale if blocks else linear.weight_scale.reshape(len(linear.weight), -1)
        if _is_packed(linear.scheme):
            tensors = {
                f"{name}.{_PACKED}": pack(linear.weight, linear.scheme.weights.num_bits),
                f"{name}.{_SHAPE}": torch.tensor(linear.weight.shape),
            }
            if linear.weight_zero_point is not None:
                zero_points = linear.weight_zero_point.reshape(len(linear.weight), -1).t()
                packed = pack(zero_points, linear.scheme.weights.num_bits)
                tensors[f"{name}.{_ZERO_POINTS}"] = packed.t().contiguous()
        else:
            tensors = {f"{name}.weight": linear.weight}
        tensors[f"{name}.weight_scale"] = _lossless(scale, dtype)
        if linear.is_static:
            tensors[f"{name}.input_scale"] = _lossless(torch.tensor([linear.input_scale], dtype=torch.float32), dtype)
            tensors[f"{name}.input_zero_point"] = torch.tensor([linear.input_zero_point], dtype=torch.int8)
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.to(dtype)
        return tensors

    def mixes(self, config: Mapping[str, Any]) -> bool:
        return has_usual_names(config.get("model_type"))

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        found = dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None)
        if not found:
            return Description(None, {})
        present = [scheme for scheme in self.schemes if scheme in found]
        present += [scheme for scheme in found if scheme not in self.schemes]
        layouts = [_layout(scheme) for scheme in present]
        mixed = len(set(layouts)) > 1
        ignore = targets(schemes, None)
        if "lm_head" not in schemes:
            ignore.append("lm_head")  # tied to the embedding, or absent: either way not quantized
        # SGLang 0.5.23 finds fused layers by their class alone (compressed_tensors/utils.py, find_matched_target); vLLM
        # 0.32 gives those of TeleChat2 other names than the files.
        by_class = present == [W8A8_DYNAMIC] and is_plain(schemes)
        quantization = {
            "quant_method": self.name,
            "format": "mixed-precision" if mixed else layouts[0],
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": _written(FP8_CACHE) if any(name.endswith(f".{_KEYS}") for name in names) else None,
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear"] if by_class else targets(schemes, scheme, config.get("model_type")),
                    "weights": _written(scheme.weights),
                    "input_activations": _written(scheme.activations),
                    "output_activations": None,
                    # int8 is what every reader expects beside quantized activations
                    **({"format": layout} if mixed or layout != _INT else {}),
                }
                for i, (scheme, layout) in enumerate(zip(present, layouts, strict=True))
            },
            "ignore": ignore,
        }
        return Description(quantization, {})

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        group = _group(checkpoint, name)
        # A target such as Linear also finds the names of norms and embeddings, which stay float.
        if self.weight(checkpoint, name).dtype in FLOATS:
            return None
        if group is None:
            return None
        found = _described(group)
        if found is not None and self.expresses(found):
            return found
        known = ", ".join(scheme.label for scheme in self.schemes)
        raise UnknownScheme(
            f"{name}: quantized, but in none of the ways that qtool knows ({known})", where=str(checkpoint.path)
        )

    def is_source(self, checkpoint: Checkpoint) -> bool:
        # Integer activations are what a quantized model is for: that one has been made already.
        names = [name for name in self.layers(checkpoint) if not fp4.is_fp4(_group(checkpoint, name))]
        return all(scheme is None or _is_weight(scheme) for scheme in (self.scheme(checkpoint, name) for name in names))

    def is_packed(self, checkpoint: Checkpoint, name: str) -> bool:
        if not any(f"{name}.{part}" in checkpoint for part in self.weight_parts):
            return False
        if f"{name}.{_PACKED}" in checkpoint and fp4.is_fp4(_group(checkpoint, name)):
            return True
        scheme = self.scheme(checkpoint, name)
        return scheme is not None and (_is_weight(scheme) or f"{name}.weight" not in checkpoint)

    def packed_shape(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        if fp4.is_fp4(_group(checkpoint, name)):
            return fp4.shape(checkpoint, name)
        scheme = self.scheme(checkpoint, name)
        assert scheme is not None
        return self.shape(Stored(checkpoint, name), scheme)

    def packed(self, checkpoint: Checkpoint, name: str) -> PackedWeight:
        if fp4.is_fp4(_group(checkpoint, name)):
            return fp4.read(checkpoint, name)
        scheme = self.scheme(checkpoint, name)
        assert scheme is not None
        return self.read(Stored(checkpoint, name), scheme)

    def shape(self, stored: Stored, scheme: Scheme) -> tuple[int, int]:
        if scheme.weights.type == "float":
            return stored.shape_of("F8_E4M3")
        if not stored.has(_PACKED):
            return stored.shape
        info = stored.checkpoint.info(f"{stored.name}.{_PACKED}")
        shape = stored.checkpoint.tensor(f"{stored.name}.{_SHAPE}").reshape(-1).tolist()
        bits = scheme.weights.num_bits
        if len(shape) != 2 or info.dtype != "I32" or [*info.shape] != [shape[0], words(shape[1], bits)]:
            raise stored.error(
                f"{_PACKED} is {info.dtype} {list(info.shape)} and {_SHAPE} {shape}, which don't fit {bits} bits"
            )
        return shape[0], shape[1]

    def read(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        out, width = shape = self.shape(stored, scheme)
        weights = scheme.weights
        zero_points = None if weights.symmetric else self._zero_points(stored, weights, shape)
        if weights.symmetric:
            stored.no_zero_point(_ZERO_POINTS, out)
        if stored.has(_PACKED):
            packed = stored.checkpoint.tensor(f"{stored.name}.{_PACKED}")
            weight = unpack(packed, weights.num_bits, width)
        else:
            weight = stored.numbers(weights)
        if weights.columns is not None:
            scale = stored.scales("weight_scale", weights, shape, signed=scheme.has_signed_scales)
        else:
            scale = stored.scale("weight_scale", out, signed=scheme.has_signed_scales)
        bias = stored.bias()
        input_scale, input_zero_point = self.inputs(stored) if scheme.is_static else (None, None)
        return QuantizedLinear(scheme, weight, scale, bias, input_scale, input_zero_point, zero_points)

    def _zero_points(self, stored: Stored, weights: QuantizationArgs, shape: tuple[int, int]) -> torch.Tensor:
        """int8, of the shape of the scales."""
        found = stored.checkpoint.tensor(f"{stored.name}.{_ZERO_POINTS}")
        try:
            wanted = weights.scales_shape(shape)
        except ValueError as error:
            raise stored.error(str(error)) from None
        packed = (words(wanted[0], weights.num_bits), *(wanted[1:] or (1,)))
        if not stored.has(_PACKED) or str(found.dtype) != "torch.int32" or tuple(found.shape) != packed:
            what = f"{_ZERO_POINTS} is {found.dtype} {list(found.shape)}, expected torch.int32 {list(packed)}"
            raise stored.error(what)
        return unpack(found.t(), weights.num_bits, wanted[0]).t().reshape(wanted)

    def inputs(self, stored: Stored) -> tuple[float, int]:
        assert W8A8.activations is not None
        scale = stored.input_scale(1)
        return scale, stored.zero_point(_ZERO_POINT, 1, W8A8.activations) if stored.has(_ZERO_POINT) else 0

    def cache_tensors(self, name: str, cache: QuantizedCache) -> dict[str, torch.Tensor]:
        return {f"{name}.{_KEYS}": cache.keys.scale, f"{name}.{_VALUES}": cache.values.scale}

    def cache_scheme(self, checkpoint: Checkpoint) -> QuantizationArgs | None:
        found = checkpoint.config["quantization_config"].get("kv_cache_scheme")
        if not found:
            return None
        args = _args(found)
        if args not in self.caches:
            what = "keys and values are quantized, but not in the way that qtool knows (e4m3, one scale for a layer)"
            raise UnknownScheme(what, where=str(checkpoint.path / "config.json"))
        return args

    def read_cache(self, checkpoint: Checkpoint, name: str) -> QuantizedCache | None:
        import torch

        args, stored = self.cache_scheme(checkpoint), Stored(checkpoint, name)
        if args is None:
            return None
        keys, values = (stored.scale(part, 1) for part in (_KEYS, _VALUES))
        zero = torch.zeros(1)
        return QuantizedCache(args, CacheScales(keys, zero), CacheScales(values, zero))


def _is_packed(scheme: Scheme) -> bool:
    weights = scheme.weights
    return weights.type == "int" and (scheme.activations is None or weights.num_bits < 8 or weights.strategy == "group")


def _is_weight(scheme: Scheme) -> bool:
    """The scheme says how weights are stored, not that integers are computed with."""
    return scheme.weights.type == "float" or scheme.activations is None


def _layout(scheme: Scheme) -> str:
    if scheme.weights.type == "float":
        return _FLOAT
    return _PACK if _is_packed(scheme) else _INT


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    import torch

    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _lossless(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow = scale.to(_scale_dtype(dtype))
    return narrow if bool((narrow.float() == scale).all()) else scale


def _written(args: QuantizationArgs | None) -> dict[str, Any] | None:
    """As config.json has it, which goes without what does not apply."""
    if args is None:
        return None
    return {name: value for name, value in dataclasses.asdict(args).items() if value is not None}


def _described(group: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config group describes, as `read` hands it out; None for descriptions of other kinds."""
    weights, inputs = _args(group.get("weights")), _args(group.get("input_activations"))
    if weights is None or (inputs is None and group.get("input_activations") is not None):
        return None
    if weights.strategy == "tensor":
        weights = dataclasses.replace(weights, strategy="channel")  # its one scale is repeated
    if inputs is not None and not inputs.dynamic and inputs.symmetric:
        inputs = dataclasses.replace(inputs, symmetric=False)  # its zero point is 0
    return Scheme(weights, inputs)


def _args(found: Any) -> QuantizationArgs | None:
    """The inverse of `_written`, for whatever is there; None where that describes no quantized tensor."""
    if not isinstance(found, dict) or "strategy" not in found:
        return None
    try:
        unused = {"group_size", "block_structure"} - _SIZES.get(found["strategy"], set())  # it may say -1 there
        fields = {name: found[name] for name in _FIELDS if name not in unused and found.get(name) is not None}
        return QuantizationArgs(**fields)
    except (TypeError, ValueError):
        return None


def _group(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """The config group that a layer belongs to; None when it is ignored or in no group."""
    quantization = checkpoint.config["quantization_config"]
    where = str(checkpoint.path / "config.json")
    try:
        if _matches(name, quantization.get("ignore") or (), where):
            return None
        groups = (quantization.get("config_groups") or {}).values()
        exact = (group for group in groups if _matches(name, group["targets"], where))
        by_class = (group for group in groups if "Linear" in group["targets"])
        return next(exact, None) or next(by_class, None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"quantization_config can't be understood: {error}", where=where) from None


def _matches(name: str, wanted: Iterable[str], where: str) -> bool:
    return any(patterns.match(each[3:], name, where) if each.startswith("re:") else each == name for each in wanted)
