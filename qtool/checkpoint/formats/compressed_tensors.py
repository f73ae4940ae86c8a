"""compressed-tensors, `int-quantized`.

Per layer: `weight` int8 [out, in]; `weight_scale` [out, 1]; with static activations also `input_scale` [1] and
`input_zero_point` int8 [1]; the layer's own `bias`. Which layer is which stands in config.json, as groups of
targets: module names, or regexes after `re:` that must match from the start of a name.

Scales: vLLM 0.32 holds them in float32, whatever it reads; transformers 5.19 (compressed-tensors 0.17) casts
them to the model's dtype. So that both compute with the same numbers, a scale is stored in the model's dtype
where that loses nothing, else in float32; `storable_scale` and `storable_weight_scale` give, for a bfloat16
model, the scales that lose nothing. (Float16's range is too short for small scales: such models keep float32.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool import patterns
from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.formats.base import (
    Description,
    HuggingFaceFiles,
    QuantizedFormat,
    UnknownScheme,
    quantization_method,
)
from qtool.checkpoint.formats.scales import check_scales, round_to
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.formats.targets import targets
from qtool.errors import InputError
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W8A8, W8A8_DYNAMIC, QuantizationArgs, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

_ZERO_POINT = "input_zero_point"
_SIZES = {"group": {"group_size"}, "block": {"block_structure"}}
_FIELDS = tuple(field.name for field in dataclasses.fields(QuantizationArgs))


class CompressedTensors(HuggingFaceFiles, QuantizedFormat):
    name = "compressed-tensors"
    title = "int8 of compressed-tensors"
    schemes = (W8A8, W8A8_DYNAMIC)
    parts = frozenset(("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias"))

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return quantization_method(config) == self.name

    def storable_scale(self, value: float, dtype: torch.dtype) -> float:
        return round_to(value, _scale_dtype(dtype))

    def storable_weight_scale(self, scale: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
        return scale.to(_scale_dtype(dtype)).float()

    def nbytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        return scheme.weights.nbytes(shape) + (5 if scheme.is_static else 0)

    def tensors(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        import torch

        check_scales(name, linear)
        tensors = {
            f"{name}.weight": linear.weight,
            f"{name}.weight_scale": _lossless(linear.weight_scale.reshape(-1, 1), dtype),
        }
        if linear.is_static:
            tensors[f"{name}.input_scale"] = _lossless(torch.tensor([linear.input_scale], dtype=torch.float32), dtype)
            tensors[f"{name}.input_zero_point"] = torch.tensor([linear.input_zero_point], dtype=torch.int8)
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.to(dtype)
        return tensors

    def describe(
        self, names: Sequence[str], schemes: Mapping[str, Scheme | None], config: Mapping[str, Any]
    ) -> Description:
        present = [scheme for scheme in self.schemes if scheme in schemes.values()]
        if not present:
            return Description(None, {})
        ignore = targets(schemes, None)
        if "lm_head" not in schemes:
            ignore.append("lm_head")  # tied to the embedding, or absent: either way not quantized
        quantization = {
            "quant_method": self.name,
            "format": "int-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": {
                f"group_{i}": {
                    "targets": targets(schemes, scheme),
                    "weights": _written(scheme.weights),
                    "input_activations": _written(scheme.activations),
                    "output_activations": None,
                }
                for i, scheme in enumerate(present)
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
        for scheme in self.schemes:
            if scheme == found:
                return scheme
        raise UnknownScheme(
            f"{name}: quantized, but not W8A8 with per-tensor static or per-token dynamic activations",
            where=str(checkpoint.path),
        )

    def read(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        weight = stored.weight()
        stored.no_zero_point("weight_zero_point", weight.shape[0])
        scale, bias = stored.scale("weight_scale", weight.shape[0]), stored.bias()
        return QuantizedLinear(
            scheme, weight, scale, bias, *(self.inputs(stored) if scheme.is_static else (None, None))
        )

    def inputs(self, stored: Stored) -> tuple[float, int]:
        assert W8A8.activations is not None
        scale = stored.input_scale(1)
        return scale, stored.zero_point(_ZERO_POINT, 1, W8A8.activations) if stored.has(_ZERO_POINT) else 0

    def check_only_linears(self, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> None:
        if checkpoint.config["quantization_config"].get("kv_cache_scheme"):
            raise InputError("its key/value cache is quantized too, which is not converted", where=str(checkpoint.path))


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
