"""What golden-stick and modelslim have in common: a file that gives every parameter a type, and the parameters of W8A8.

`weight` int8 [out, in]; `weight_scale`; `weight_offset`, zeros; with static activations also `input_scale`,
`input_offset` (the zero point), `deq_scale` = input_scale · weight_scale, `quant_bias` = -Σ_in input_offset · weight.
The runtime computes q = clip(round(x / input_scale) + input_offset), y = (q·Wᵀ + quant_bias) · deq_scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qtool.checkpoint.formats import nibbles
from qtool.checkpoint.formats.base import Inexpressible, QuantizedFormat, UnknownScheme
from qtool.checkpoint.formats.stored import Stored
from qtool.errors import InputError
from qtool.quant.types import QuantizedLinear
from qtool.scheme import INT8_CACHE, W8A8, W8A8_DYNAMIC, QuantizationArgs, Scheme

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.reader import Checkpoint

TYPES: dict[Scheme | None, str] = {W8A8: "W8A8", W8A8_DYNAMIC: "W8A8_DYNAMIC", None: "FLOAT"}
"""A scheme, in the word that description files have for it; those of `nibbles` have one for all."""

_OTHER_TYPES = ("fa_quant_type", "indexer_quant_type")
CACHE_TYPES = ("kv_cache_type", "kv_quant_type")


class DescribedFormat(QuantizedFormat):
    """Its `files` are one file: the description."""

    schemes: ClassVar[tuple[Scheme, ...]] = (W8A8, W8A8_DYNAMIC)
    parts = frozenset(
        ("weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "deq_scale", "quant_bias", "bias")
    )
    scale_parts: ClassVar[tuple[str, ...]] = ("weight_scale", "deq_scale")  # older Golden Sticks keep the latter alone

    def detect(self, config: Mapping[str, Any], files: Container[str]) -> bool:
        return self.files[0] in files

    def expresses(self, scheme: Scheme) -> bool:
        return scheme in self.schemes or nibbles.has(scheme)

    def problems(self, schemes: Mapping[str, Scheme | None]) -> list[Inexpressible]:
        found = super().problems(schemes)
        sizes = {scheme.weights.group_size for scheme in schemes.values() if scheme is not None and nibbles.has(scheme)}
        if len(sizes) > 1:
            shown = " and ".join(sorted(str(size) if size else "without groups" for size in sizes))
            what = f"{self.name} has one group_size for all layers of 4 bits, not {shown}"
            found.append(Inexpressible(what, hint="give the same group_size to all of them"))
        return found

    def misfit(self, name: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
        return nibbles.misfit(name, shape) if nibbles.has(scheme) else None

    def shape(self, stored: Stored, scheme: Scheme) -> tuple[int, int]:
        return nibbles.shape(stored) if nibbles.has(scheme) else stored.shape

    def described(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """The description file: parameter name → type, and some more."""
        return checkpoint.by_tensor(self.files[0])

    def scheme(self, checkpoint: Checkpoint, name: str) -> Scheme | None:
        described = self.described(checkpoint)
        kind = described.get(f"{name}.weight", TYPES[None])
        for scheme, known in TYPES.items():
            if known == kind:
                return scheme
        found = nibbles.scheme(self.group_size(checkpoint, name)) if kind == nibbles.WORD else None
        if found is None or not self.expresses(found):
            raise unknown_scheme(checkpoint, name)
        return found

    def group_size(self, checkpoint: Checkpoint, name: str) -> object:
        """What the description says of a layer of 4 bits; None where it says nothing."""
        return self.described(checkpoint).get("group_size")

    def inputs(self, stored: Stored) -> tuple[float, int]:
        assert W8A8.activations is not None
        _, in_size = stored.shape
        return stored.input_scale(in_size), stored.zero_point("input_offset", in_size, W8A8.activations)

    def check_only_linears(self, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> None:
        described = self.described(checkpoint)
        for name, kind in described.items():
            owner, _, part = name.rpartition(".")
            known = owner in schemes or part in self.cache_parts or kind == TYPES[None]
            if name in checkpoint and not known:
                raise InputError(f"{name} is {str(kind)[:40]}, which is not converted", where=str(checkpoint.path))
        for key in _OTHER_TYPES:
            if described.get(key) not in (None, "", TYPES[None]):
                what = f"its attention is quantized too ({key}: {described[key]}), which is not converted"
                raise InputError(what, where=str(checkpoint.path))

    def cache_scheme(self, checkpoint: Checkpoint) -> QuantizationArgs | None:
        described = self.described(checkpoint)
        for key in CACHE_TYPES:
            kind = described.get(key)
            if kind == "C8" and INT8_CACHE in self.caches:
                return INT8_CACHE
            if kind not in (None, "", TYPES[None]):
                what = f"keys and values are quantized in a way that qtool doesn't read ({key}: {str(kind)[:40]})"
                raise UnknownScheme(what, where=str(checkpoint.path / self.files[0]))
        return None

    def read_parts(self, stored: Stored, scheme: Scheme) -> QuantizedLinear:
        """A layer from the parameters that both formats have."""
        import torch

        weight, bias = stored.weight(), stored.bias()
        out_size, _ = stored.shape
        stored.no_zero_point("weight_offset", out_size)
        if not scheme.is_static:
            return QuantizedLinear(scheme, weight, stored.scale("weight_scale", out_size), bias)
        input_scale, zero_point = self.inputs(stored)
        if stored.has("weight_scale"):
            weight_scale = stored.scale("weight_scale", out_size)
        else:
            deq_scale = stored.vector("deq_scale", out_size)
            if deq_scale.dtype == torch.int64:  # the bits of a float32, as the float16 kernels want them
                deq_scale = deq_scale.to(torch.int32).view(torch.float32)
            weight_scale = deq_scale / input_scale
        return QuantizedLinear(scheme, weight, weight_scale, bias, input_scale, zero_point)


def word(scheme: Scheme | None) -> str:
    """What descriptions call a scheme that these formats have."""
    return nibbles.WORD if scheme is not None and nibbles.has(scheme) else TYPES[scheme]


def group_size(schemes: Mapping[str, Scheme | None]) -> dict[str, int]:
    """What descriptions of a model with layers of 4 bits say besides."""
    found = [scheme for scheme in schemes.values() if scheme is not None and nibbles.has(scheme)]
    return {"group_size": found[0].weights.group_size or 0} if found else {}


def unknown_scheme(checkpoint: Checkpoint, name: str) -> UnknownScheme:
    return UnknownScheme(
        f"{name}: quantized, but not W8A8 with per-tensor static or per-token dynamic activations, or W4A8",
        where=str(checkpoint.path),
    )


def zero_point_correction(linear: QuantizedLinear) -> torch.Tensor:
    """int32 [out]: -input_zero_point · the sum of each output channel's int8 weights."""
    import torch

    assert linear.input_zero_point is not None
    return -linear.input_zero_point * linear.weight.sum(dim=1, dtype=torch.int32)


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
    correction = zero_point_correction(linear).double()
    deq_scale = linear.weight_scale.double() * linear.input_scale
    held = stored.vector("quant_bias", len(correction)).double() - correction
    expected = torch.zeros_like(held) if known is None else known.double() / deq_scale
    if bool(((held - expected).abs() <= 1 + correction.abs() * 2**-22 + expected.abs() * 2**-22).all()):
        return linear
    if linear.bias is not None:
        raise stored.error("quant_bias does not fit the weight, the input's zero point and the bias")
    return dataclasses.replace(linear, bias=(held * deq_scale).float())
