"""What converting a quantized checkpoint will do, and whether it can be done: before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qtool import runtimes
from qtool.checkpoint import dtypes, formats
from qtool.checkpoint.formats import DEQUANTIZED, Holding, QuantizedFormat
from qtool.checkpoint.formats.fused import fused_name
from qtool.checkpoint.formats.stored import Stored
from qtool.checkpoint.norms import idle_biases
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.summary import float_dtype, quantized_layers
from qtool.errors import InputError
from qtool.scheme import W8A8_ASYMMETRIC, W8A8_DYNAMIC, QuantizationArgs, Scheme, cache_name, name_of

_WITH_BIASES = "modelslim"  # whose readers know norms with a bias
_MAX_ROUNDING = 2**-8  # relative; more than that and the dtype's range is too short for the scale


@dataclass(frozen=True)
class Conversion:
    """What will be done.

    Attributes:
        format: of the source.
        target: the new format; None for the float model in bfloat16.
        schemes: of every quantized layer, by its name without ".weight".
        dtype: safetensors code of the model's float tensors.
        warnings: what the new format's runtimes may not like.
        rounding: the largest relative change of an input scale.
        left_out: tensors that say nothing, and that the target's readers don't know.
        scheme: which all layers get, their numbers rounded again; None keeps the numbers.
    """

    format: QuantizedFormat
    target: Holding | None
    schemes: dict[str, Scheme]
    dtype: str
    warnings: tuple[str, ...] = ()
    rounding: float = 0.0
    left_out: frozenset[str] = frozenset()
    scheme: Scheme | None = None

    @property
    def written(self) -> dict[str, Scheme]:
        """The new scheme of every quantized layer."""
        return self.schemes if self.scheme is None else dict.fromkeys(self.schemes, self.scheme)

    def is_rounded(self, name: str) -> bool:
        """Whether the numbers of a layer change."""
        return self.scheme not in (None, self.schemes[name])

    @property
    def to(self) -> str:
        """The target's name."""
        return self.target.name if self.target else DEQUANTIZED

    def output_bytes(self, source: Checkpoint) -> int:
        """Size of the new tensors: layers as the format says, or two bytes for each of their numbers."""
        total = 0
        for tensor in source.names:
            if tensor in self.left_out:
                continue
            info = source.info(tensor)
            owner, _, part = tensor.rpartition(".")
            if owner not in self.schemes:
                narrowed = self.target is None and info.dtype == self.dtype
                total += info.nbytes * 16 // dtypes.BITS[info.dtype] if narrowed else info.nbytes
            elif part == "bias":
                total += info.nbytes
        for name, scheme in self.schemes.items():
            rows, columns = self.format.shape(Stored(source, name), scheme)
            total += self.target.nbytes((rows, columns), self.written[name]) if self.target else 2 * rows * columns
        return total


def plan(source: Checkpoint, to: str, scheme: Scheme | None = None) -> Conversion:
    """Decide how every tensor is converted, from headers, descriptions and static layers' input scales.

    Args:
        to: one of `formats.TARGETS`; with a scheme, a format that has it.
        scheme: to round all quantized layers to, which needs no calibration.

    Raises:
        InputError: whatever makes the conversion impossible.
    """
    form = _source_format(source, to, scheme)
    schemes = quantized_layers(source, form)
    form.check_only_linears(source, schemes)
    dtype = float_dtype(source, schemes) or "BF16"
    idle = frozenset(idle_biases(source, f"the model in {to}") if to != _WITH_BIASES else ())
    cache = form.cache_scheme(source)
    if scheme is not None and set(schemes.values()) == {scheme}:
        raise InputError(f"all quantized layers of this checkpoint are {scheme.label} already", where=str(source.path))
    if to == DEQUANTIZED:
        lost = () if cache is None else (f"keys and values are kept as floats, not as {cache_name(cache)}",)
        cached = {name for name in source.names if name.rpartition(".")[2] in form.cache_parts}
        return Conversion(form, None, schemes, dtype, lost, left_out=idle | cached)
    target = formats.target(to)
    if cache is not None and form.name != to:
        what = f"keys and values are kept as {cache_name(cache)}, which is not converted to {to}"
        raise InputError(what, where=str(source.path), hint=f"--to {DEQUANTIZED} leaves it out.")
    schemes, without = (schemes, []) if scheme is not None else _without_zero_points(schemes, target)
    conversion = Conversion(form, target, schemes, dtype, left_out=idle, scheme=scheme)
    warnings = [*without, *_expressible(source, target, conversion.written, dtype, cache)]
    for name, wanted in conversion.written.items():
        if (why := target.misfit(name, form.shape(Stored(source, name), schemes[name]), wanted)) is not None:
            hint = f"--to {DEQUANTIZED} can." if scheme is None else "--scheme fp8-dynamic has a scale for each row."
            raise InputError(f"{name}: {why}", where=str(source.path), hint=hint)
    rounding = _check_inputs(source, conversion, target)
    return replace(conversion, warnings=tuple(warnings), rounding=rounding)


def _source_format(source: Checkpoint, to: str, scheme: Scheme | None) -> QuantizedFormat:
    where, form = str(source.path), formats.of(source)
    if scheme is not None and not isinstance(form, QuantizedFormat) and form.is_source(source):
        what = (
            "not quantized" if form is formats.PLAIN else f"quantized with {form.name}, which is read as a float model"
        )
        hint = f"qtool quantize {source.path} --scheme {(name_of(scheme) or '').lower()}"
        raise InputError(what, where=where, hint=hint)
    if form is formats.PLAIN:
        hint = f"Quantize it: qtool quantize {source.path}" + ("" if to == DEQUANTIZED else f" --format {to}")
        what = "this model is already float" if to == DEQUANTIZED else "not quantized"
        raise InputError(what, where=where, hint=hint)
    if not isinstance(form, QuantizedFormat):
        hint = f"It converts {', '.join(formats.NAMES)}."
        raise InputError(f"quantized with {form.name}, which qtool doesn't convert", where=where, hint=hint)
    if form.name == to and scheme is None:
        raise InputError(f"this checkpoint is {to} already", where=where)
    return form


def _without_zero_points(schemes: dict[str, Scheme], target: Holding) -> tuple[dict[str, Scheme], list[str]]:
    """Dynamic layers as the target can say them, whose integers of the weights are the same; what that costs."""
    found, lost = dict(schemes), 0
    for name, scheme in schemes.items():
        if scheme == W8A8_ASYMMETRIC and not target.expresses(scheme):
            found[name] = W8A8_DYNAMIC
            lost += 1
    if not lost:
        return found, []
    return found, [
        f"{target.name} has no zero point per token: what enters {lost} layers is quantized symmetrically, which is a "
        "little less exact"
    ]


def _expressible(
    source: Checkpoint,
    target: Holding,
    schemes: Mapping[str, Scheme],
    dtype: str,
    cache: QuantizationArgs | None,
) -> list[str]:
    """What the runtimes of `target` may not like. Raises InputError for what they can't load."""
    linears = {name: schemes.get(name) for name in formats.of(source).layers(source)}
    where, kept = str(source.path), None if cache is None else cache_name(cache)
    for problem in target.problems(linears):
        raise InputError(problem.text, where=where, hint=f"--to {DEQUANTIZED} can.")
    limitations = runtimes.problems(target.name, source.config, linears, dtype, kept)
    for limitation in limitations:
        if limitation.fatal or limitation.unread:
            raise InputError(limitation.text, where=where, hint=limitation.hint)
    return [str(limitation) for limitation in limitations]


def _check_inputs(source: Checkpoint, conversion: Conversion, target: Holding) -> float:
    """The largest relative change of a static layer's input scale. Raises InputError for scales that can't be kept."""
    dtype = dtypes.to_torch(conversion.dtype)
    assert dtype is not None
    siblings: dict[str, tuple[str, tuple[float, int]]] = {}
    largest = 0.0
    for name, scheme in conversion.written.items():
        if not scheme.is_static:
            continue
        stored = Stored(source, name)
        scale, zero_point = inputs = conversion.format.inputs(stored)
        change = abs(target.storable_scale(scale, dtype) - scale) / scale
        if not change <= _MAX_ROUNDING:
            raise stored.error(
                f"{target.name} holds input scales in the model's dtype, and {conversion.dtype} changes {scale:.4g} "
                f"by {change:.1%}"
            )
        largest = max(largest, change)
        first, expected = siblings.setdefault(fused_name(name) or name, (name, inputs))
        if inputs != expected:
            raise stored.error(
                f"its input scale and zero point ({scale:.6g}, {zero_point}) differ from those of {first} "
                f"({expected[0]:.6g}, {expected[1]}), but runtimes load one of them for both"
            )
    return largest
