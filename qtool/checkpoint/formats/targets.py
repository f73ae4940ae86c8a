"""Layers by few patterns, as compressed-tensors names them in config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qtool.checkpoint.formats.fused import fused_name
from qtool.scheme import Scheme

# model_type of families whose class in vLLM 0.32 doesn't say what its fused layers are made of: it has no
# packed_modules_mapping, and asks for these layers under their own names.
_WHOLE = frozenset(("gptj", "stablelm"))
# Of families whose class in vLLM 0.32 has other modules around the linears: it asks for layers.0.qkv_proj, not
# layers.0.self_attn.q_proj; for mixer.in_proj, not mamba.in_proj; for attn, not self_attn; for .down_proj alone.
_MOVED = frozenset(("aria", "falcon_h1", "gpt_oss", "granitemoehybrid", "jamba", "zamba2"))
# And of one that gives a linear no name at all there (MiniCPM3's q_a_proj): the class finds it.
_NAMELESS = frozenset(("minicpm3",))
_PLAIN = frozenset(
    (
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")),
        *(f"self_attention.{name}" for name in ("query", "key_value", "dense")),
        *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")),
    )
)
_AROUND = ("embed_tokens", "word_embeddings", "lm_head")


def targets(schemes: Mapping[str, Scheme | None], scheme: Scheme | None, model_type: object = None) -> list[str]:
    """The layers of one scheme, as few targets as possible: one regex for all layers whose names end alike where
    no layer of another scheme ends so too; else one that lists the decoder layers, whose experts are of one scheme
    mostly; and plain names for the rest.

    Args:
        model_type: as config.json has it.
    """
    by_ending: dict[str, list[str]] = {}
    for name in schemes:
        ending = _ending(name)
        by_ending.setdefault(ending.rpartition(".")[2] if model_type in _MOVED else ending, []).append(name)
    fused = {name: _fused(ending) for ending, names in by_ending.items() for name in names}
    found: list[str] = []
    for ending, names in by_ending.items():
        wanted = [name for name in names if schemes[name] == scheme]
        tail, whole = f".{ending}", _fused(ending)
        others = [n for n, its in schemes.items() if its != scheme and (n.endswith(tail) or fused[n] == whole)]
        if ending not in names and not others:
            found += [f"re:.*\\.{_pattern(ending, whole=model_type in _WHOLE)}$"] if wanted else []
        else:
            found += _by_layer([*dict.fromkeys((*names, *others))], wanted)
    if model_type in _NAMELESS and all(its == scheme for name, its in schemes.items() if _ending(name) != name):
        found.append("Linear")
    return found


def has_usual_names(model_type: object) -> bool:
    """Whether vLLM finds a layer by its whole name in the checkpoint, and not only by what names end with."""
    return model_type not in _WHOLE | _MOVED | _NAMELESS


def is_plain(schemes: Mapping[str, Scheme | None]) -> bool:
    """Whether a model's decoder layers have the linears of attention and of a dense feed-forward block, all of them
    quantized, and no others, and the model has nothing else but float embeddings and lm_head. Then "Linear", the class,
    means those layers to every runtime."""
    return all(
        (scheme is not None and _ending(name) in _PLAIN)
        or (scheme is None and _ending(name) == name and name.rpartition(".")[2] in _AROUND)
        for name, scheme in schemes.items()
    )


def _fused(ending: str) -> str:
    """What runtimes call it together with others: GLM-4V's text has gate and up in one, its tower apart."""
    return fused_name(f".{ending}") or f".{ending}"


def _pattern(ending: str, *, whole: bool) -> str:
    """For what names end with, and what vLLM calls the same."""
    pattern = re.escape(ending)
    if ending.startswith("conv."):
        return f"(short_)?{pattern}"  # LFM2; vLLM 0.32 renames layers in names, but not in patterns
    if whole and (fused := fused_name(f".{ending}")) is not None:
        return f"({pattern}|{re.escape(fused.removeprefix('.'))})"
    return pattern


def _by_layer(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Targets for `wanted`, some of `names`, which end alike: re:.*layers.(0|1).mlp.experts.[0-9]+.up_proj and such."""
    shapes: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name)
        head, layer, rest = match.groups() if match else (name, "", "")
        shapes.setdefault((head, re.sub(r"\.\d+\.", ".*.", rest)), {}).setdefault(layer, []).append(name)
    chosen, found = set(wanted), []
    towers = _towers(chosen, [name for name in names if name not in chosen])
    for (head, rest), layers in shapes.items():
        whole = [layer for layer, members in layers.items() if layer and chosen.issuperset(members)]
        covered = {name for layer in whole for name in layers[layer]}
        if len(covered) > 1 or (covered and towers):
            pattern = re.escape(rest).replace(r"\*", "[0-9]+")
            found.append(f"re:{_head(head, towers)}\\.({'|'.join(whole)})\\.{pattern}$")
        else:
            covered = set()
        found += [name for members in layers.values() for name in members if name in chosen and name not in covered]
    return found


def _towers(wanted: set[str], others: Sequence[str]) -> list[str]:
    """What names of other lists of layers have in them, and no wanted one: vision_tower, visual, audio_tower."""
    usual = {part for name in wanted for part in name.split(".")}
    lists = {name.split(".layers.")[0].split(".blocks.")[0] for name in wanted}
    apart = [name for name in others if not any(name.startswith(f"{each}.") for each in lists)]
    marks = (
        next((part for part in name.split(".") if part not in usual and not part.isdigit()), None) for name in apart
    )
    found = {mark for mark in marks if mark is not None}
    return sorted(found | ({"language"} if "language_model" in found else set()))  # LFM2-VL's, in vLLM 0.32


def _head(head: str, towers: Sequence[str]) -> str:
    """A pattern for the list of layers. In a model with towers, runtimes call it otherwise than the checkpoint does."""
    if not towers:
        return re.escape(head)
    return f"(?!.*\\b({'|'.join(map(re.escape, towers))})\\b).*\\b{re.escape(head.rpartition('.')[2])}"


def _ending(name: str) -> str:
    """What follows the last number in a layer's name: self_attn.q_proj of model.layers.3.self_attn.q_proj."""
    match = re.fullmatch(r".*\.\d+\.(.+)", name)
    return match.group(1) if match else name
