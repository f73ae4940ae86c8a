"""config.json, before anybody believes it: values are of the kinds that they should be, sizes those of the tensors.

A library would build the model first that the file describes: with 10⁹ layers that takes all memory, and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from qtool.checkpoint.header import TensorInfo
from qtool.errors import InputError

_KINDS: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "dtype": (str,),
    "model_type": (str,),
    "quantization_config": (dict,),
    "rope_parameters": (dict,),
    "rope_scaling": (dict,),
    "text_config": (dict,),
    "torch_dtype": (str,),
    "hidden_size": (int,),
    "max_position_embeddings": (int,),
    "num_hidden_layers": (int,),
    "vocab_size": (int,),
    "eos_token_id": (int, list),
}
_WORDS: dict[type, str] = {list: "a list", dict: "an object", str: "a string", int: "a whole number"}
_HINT = "check that config.json belongs to these weights"

_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
_SIZES = re.compile(
    r"(hidden|intermediate|vocab|embedding|ffn|state|conv)_size|(moe|shared_expert|mlp)_\w*intermediate_size"
    r"|\w*(head|hidden|model|ffn|inner)_dim|head_dim\w*|d_model|d_ff|n_embd|n_inner|n_head|\w+_heads|\w+_rank"
    r"|(num|n)_(\w+_)?experts"
)
_MOST_BLOCKS = 10_000  # of anything that layers are made of, or that stands beside them
MOST_TOKENS = 1 << 24  # of context: runtimes make tables of that length
_PACKED = 8  # numbers that formats put into one


def check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a value of another kind than whoever reads it takes."""
    for part in (config, config.get("text_config") or {}):
        for key, kinds in _KINDS.items():
            value = part.get(key)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                wanted = " or ".join(_WORDS[kind] for kind in kinds)
                raise InputError(f"{key} must be {wanted}, not {str(value)[:40]!r}", where=where, hint=_HINT)
        for key, kind in (("architectures", str), ("eos_token_id", int)):
            value = part.get(key)
            if isinstance(value, list) and not all(isinstance(one, kind) for one in value):
                raise InputError(f"{key} must be a list of {_WORDS[kind]} each", where=where, hint=_HINT)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of config.json is about the language model."""
    return config.get("text_config") or config


def head_size(config: Mapping[str, Any]) -> int | None:
    """Channels of a key; None where config.json names no heads."""
    text = text_config(config)
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    return None if heads is None or width is None else text.get("head_dim") or width // heads


def kept_per_token(config: Mapping[str, Any]) -> int | None:
    """How many numbers are kept of a token: its keys and values in all layers, an upper bound.

    None where config.json names no heads.
    """
    text = text_config(config)
    if (size := head_size(config)) is None:
        return None
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    return int(2 * text["num_hidden_layers"] * heads * size)


def context(config: Mapping[str, Any]) -> int | None:
    """Tokens that a prompt and its answer may have together; None where config.json doesn't say.

    Linear and dynamic scaling of positions multiply it (transformers 5.19, modeling_rope_utils.py); the other kinds
    are in max_position_embeddings already.
    """
    text = text_config(config)
    most = text.get("max_position_embeddings")
    if not isinstance(most, int):
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor")
    if kind not in ("linear", "dynamic") or not _is_number(factor) or not 1 <= factor < MOST_TOKENS:
        return most
    return int(most * factor)


def check_claims(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """That no size is beyond what the tensors can be of. Cheap: it takes their names and shapes.

    Raises:
        InputError: more layers than are there, a width or a number of experts that no tensor has, or a context that no
            model has.
    """
    largest = max((size for info in tensors.values() for size in info.shape), default=0)
    layers = 1 + max((int(part) for name in tensors for part in name.split(".") if _is_place(part)), default=0)
    for part in (config, text_config(config)):
        for key in sorted(_LAYERS & part.keys()):
            value = part[key]
            if _is_number(value) and value > layers:
                raise _refused(key, value, f"the tensors are of {layers} at most", where)
    for key, value in _numbers(config):
        if key == "max_position_embeddings" and value > MOST_TOKENS:
            raise _refused(key, value, f"qtool takes no more than {MOST_TOKENS:,}", where)
        if _SIZES.fullmatch(key) and value > _PACKED * largest:
            raise _refused(key, value, f"no tensor has a side longer than {largest:,}", where)
        if re.fullmatch(r"\w*(layers?|blocks|depth)", key) and value > max(_MOST_BLOCKS, layers):
            raise _refused(key, value, f"the tensors are of {layers} layers at most", where)


def _is_place(part: str) -> bool:
    """Whether this part of a tensor's name counts layers, or experts."""
    return part.isdecimal() and part.isascii() and len(part) < 7


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(part: Any) -> Iterator[tuple[str, int | float]]:
    """Every number in config.json that stands by a key, however deep."""
    pending: list[Any] = [part]
    while pending:
        found = pending.pop()
        for key, value in found.items() if isinstance(found, dict) else ():
            if _is_number(value):
                yield key, value
            pending.append(value)
        if isinstance(found, list):
            pending += found


def _refused(key: str, value: float, why: str, where: str) -> InputError:
    return InputError(f"{key} is {value:,}, but {why}", where=where, hint=_HINT)
