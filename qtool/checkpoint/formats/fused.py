"""Layers that runtimes run side by side as one matrix product, so that their schemes and input scales must agree."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.scheme import Scheme

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}


def fused_name(name: str) -> str | None:
    """What a layer is part of at run time; None for one that stays by itself."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_FUSED[last]}" if last in _FUSED else None


def disagreements(schemes: Mapping[str, Scheme | None]) -> list[str]:
    """A sentence for every group of layers (name → scheme, None: float) that is fused and has several schemes."""
    groups: dict[str, list[str]] = {}
    for name in schemes:
        if fused := fused_name(name):
            groups.setdefault(fused, []).append(name)
    return [
        f"{fused} is one layer at run time, but its parts differ: "
        + ", ".join(f"{part.rpartition('.')[2]} {_label(schemes[part])}" for part in parts)
        for fused, parts in groups.items()
        if len({schemes[part] for part in parts}) > 1
    ]


def _label(scheme: Scheme | None) -> str:
    return scheme.label if scheme else "float"
