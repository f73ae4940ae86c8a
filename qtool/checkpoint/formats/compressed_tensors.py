"""compressed-tensors, `int-quantized`: read by vLLM (CPU, CUDA, ROCm) and transformers.

Per layer: `weight` int8 [out, in]; `weight_scale` [out, 1]; with static activations also `input_scale` [1] and
`input_zero_point` int8 [1]; the layer's own `bias`. Which layer is which stands in config.json, as groups of
targets: module names, or regexes after `re:` that must match from the start of a name.

Scales: vLLM 0.32 holds them in float32, whatever it reads; transformers 5.19 (compressed-tensors 0.17) casts
them to the model's dtype. So that both compute with the same numbers, a scale is stored in the model's dtype
where that loses nothing, else in float32; `storable_scale` and `storable_weight_scale` give, for a bfloat16
model, the scales that lose nothing. (Float16's range is too short for small scales: such models keep float32.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.dtypes import FLOATS
from qtool.checkpoint.formats.common import Description, Mode, Stored, check_scales, round_to
from qtool.checkpoint.formats.safetensors import HuggingFaceFiles
from qtool.errors import InputError
from qtool.quant.types import QuantizedLinear
from qtool.scheme import W8A8, W8A8_DYNAMIC

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS: dict[Mode, dict[str, Any]] = {
    "static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "dynamic": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}


class CompressedTensors(HuggingFaceFiles):
    name = "compressed-tensors"

    def storable_scale(self, value: float, dtype: torch.dtype | None = None) -> float:
        return round_to(value, _scale_dtype(dtype))

    def storable_weight_scale(
        self, scale: torch.Tensor, mode: Mode = "dynamic", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return scale.to(_scale_dtype(dtype)).float()

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

    def describe(self, names: Sequence[str], linears: Mapping[str, Mode], config: Mapping[str, Any]) -> Description:
        present = [mode for mode in _ACTIVATIONS if mode in linears.values()]
        if not present:
            return Description(None, {})
        ignore = targets(linears, "float")
        if "lm_head" not in linears:
            ignore.append("lm_head")  # tied to the embedding, or absent: either way not quantized
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": {
                f"group_{i}": {
                    "targets": targets(linears, mode),
                    "weights": dict(_WEIGHTS),
                    "input_activations": dict(_ACTIVATIONS[mode]),
                    "output_activations": None,
                }
                for i, mode in enumerate(present)
            },
            "ignore": ignore,
        }
        return Description(quantization, {})

    def mode(self, checkpoint: Checkpoint, name: str) -> Mode | None:
        scheme = _scheme(checkpoint, name)
        return "float" if scheme is None else _mode(scheme)

    def read(self, stored: Stored, mode: Mode) -> QuantizedLinear:
        weight = stored.weight()
        stored.zero("weight_zero_point", weight.shape[0])
        scale, bias = stored.scale("weight_scale", weight.shape[0]), stored.bias()
        if mode == "dynamic":
            return QuantizedLinear(W8A8_DYNAMIC, weight, scale, bias)
        return QuantizedLinear(W8A8, weight, scale, bias, *self.inputs(stored))

    def inputs(self, stored: Stored) -> tuple[float, int]:
        offset = stored.offset("input_zero_point", 1) if stored.has("input_zero_point") else 0
        return stored.input_scale(1), offset


def _scale_dtype(dtype: torch.dtype | None) -> torch.dtype:
    import torch

    return torch.bfloat16 if dtype in (None, torch.bfloat16) else torch.float32


def _lossless(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow = scale.to(_scale_dtype(dtype))
    return narrow if bool((narrow.float() == scale).all()) else scale


def targets(linears: Mapping[str, Mode], mode: Mode) -> list[str]:
    """The layers of one mode, as few targets as possible: one regex for all layers whose names end alike where
    no layer of another mode ends so too; else one that lists the decoder layers, whose experts are of one mode mostly;
    and plain names for the rest."""
    by_ending: dict[str, list[str]] = {}
    for name in linears:
        by_ending.setdefault(_ending(name), []).append(name)
    found: list[str] = []
    for ending, names in by_ending.items():
        wanted = [name for name in names if linears[name] == mode]
        tail = f".{ending}"
        if ending not in names and all(its == mode for name, its in linears.items() if name.endswith(tail)):
            found += [f"re:.*\\.{re.escape(ending)}$"] if wanted else []
        else:
            found += _by_layer(names, wanted)
    return found


def _by_layer(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Targets for `wanted`, some of `names`, which end alike: re:.*layers.(0|1).mlp.experts.[0-9]+.up_proj and such."""
    shapes: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name)
        head, layer, rest = match.groups() if match else (name, "", "")
        shapes.setdefault((head, re.sub(r"\.\d+\.", ".*.", rest)), {}).setdefault(layer, []).append(name)
    chosen, found = set(wanted), []
    for (head, rest), layers in shapes.items():
        whole = [layer for layer, members in layers.items() if layer and chosen.issuperset(members)]
        covered = {name for layer in whole for name in layers[layer]}
        if len(covered) > 1:
            pattern = re.escape(rest).replace(r"\*", "[0-9]+")
            found.append(f"re:{re.escape(head)}\\.({'|'.join(whole)})\\.{pattern}$")
        else:
            covered = set()
        found += [name for members in layers.values() for name in members if name in chosen and name not in covered]
    return found


def _ending(name: str) -> str:
    """What follows the last number in a layer's name: self_attn.q_proj of model.layers.3.self_attn.q_proj."""
    match = re.fullmatch(r".*\.\d+\.(.+)", name)
    return match.group(1) if match else name


def _scheme(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """The config group that a layer belongs to; None when it is ignored or in no group."""
    quantization = checkpoint.config["quantization_config"]
    try:
        if _matches(name, quantization.get("ignore") or ()):
            return None
        groups = (quantization.get("config_groups") or {}).values()
        exact = (group for group in groups if _matches(name, group["targets"]))
        by_class = (group for group in groups if "Linear" in group["targets"])
        found = next(exact, None) or next(by_class, None)
        # A target such as Linear also finds the names of norms and embeddings, which stay float.
        return found if checkpoint.info(f"{name}.weight").dtype not in FLOATS else None
    except (re.error, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"quantization_config can't be understood: {error}", where=str(checkpoint.path / "config.json")
        ) from None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name
        for pattern in patterns
    )


def _mode(scheme: Mapping[str, Any]) -> Mode | None:
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        return None
    if any(args.get("num_bits") != 8 or args.get("type", "int") != "int" for args in (weights, inputs)):
        return None
    if weights.get("strategy") not in ("channel", "tensor") or not weights.get("symmetric", True):
        return None
    if inputs.get("dynamic") is True:
        return "dynamic" if inputs.get("strategy") == "token" and inputs.get("symmetric", True) else None
    return "static" if not inputs.get("dynamic") and inputs.get("strategy") == "tensor" else None
