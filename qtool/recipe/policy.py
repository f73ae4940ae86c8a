"""What a recipe says of some linear layers: their weights, activations, smoothing and rounding.

Where there is a choice of methods, `method` (of activations: `mode`) says which, and the other keys are those of that
one; a string is short for a method without further keys. Recipes and qtool.json files of earlier versions, which had
those keys elsewhere, still load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from qtool.recipe.strict import Regex, ShortFor, Strict, wrong
from qtool.recipe.words import short
from qtool.scheme import PRESETS, QuantizationArgs, Scheme, named


class Weights(Strict):
    """How weights are stored, in the terms of `qtool.scheme`: as symmetric integers."""

    num_bits: int = Field(default=8, ge=2, le=8)
    type: Literal["int"] = "int"
    strategy: Literal["tensor", "channel", "group"] = Field(default="channel", description="what shares a scale")
    group_size: int | None = Field(default=None, gt=0, description="for group: input channels that share a scale")
    symmetric: bool = True

    @model_validator(mode="before")
    @classmethod
    def _group_size_says_group(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("group_size") is not None:
            return {"strategy": "group", **data}
        return data

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        size, strategy = given.get("group_size"), given.get("strategy")
        if given.get("symmetric") is False:
            yield "symmetric", "must be true: qtool gives weights no zero point"
        if strategy == "group" and size is None:
            yield "group_size", "is missing, but strategy group needs it"
        if strategy in ("tensor", "channel") and size is not None:
            yield "group_size", f"has no meaning with strategy {strategy}"

    @property
    def args(self) -> QuantizationArgs:
        return QuantizationArgs(
            num_bits=self.num_bits, type=self.type, strategy=self.strategy, group_size=self.group_size
        )


class MinMax(Strict):
    """From the least to the largest value."""

    method: Literal["minmax"]


class Percentile(Strict):
    """Without the values beyond a percentile, on both sides."""

    method: Literal["percentile"]
    percentile: float = Field(default=99.99, gt=50, le=100)


class LeastError(Strict):
    """With the least mean squared error."""

    method: Literal["mse"]


Observer = Annotated[MinMax | Percentile | LeastError, Field(discriminator="method"), ShortFor("method")]


class Dynamic(Strict):
    """A scale per token, found at run time."""

    mode: Literal["dynamic"]

    @property
    def args(self) -> QuantizationArgs:
        return QuantizationArgs(strategy="token", dynamic=True)


class Static(Strict):
    """One scale and zero point for the whole tensor; its range is fixed in calibration."""

    mode: Literal["static"]
    observer: Observer = Field(default=MinMax(method="minmax"), description="how the range is chosen")

    @property
    def args(self) -> QuantizationArgs:
        return QuantizationArgs(strategy="tensor", symmetric=False)


class Unquantized(Strict):
    """The input stays as it is, in the model's float type."""

    mode: Literal["float"]

    @property
    def args(self) -> None:
        return None


def _one_observer(activations: Any) -> Any:
    """The observer's percentile used to stand beside its name, and both, unless changed, beside dynamic activations."""
    if not isinstance(activations, dict) or not isinstance(activations.get("observer", ""), str):
        return activations
    found = dict(activations)
    percentile = found.pop("percentile", None)
    if found.get("mode") != "static":
        if found.get("observer", "minmax") != "minmax":
            raise wrong("observer", f"has no meaning with {found.get('mode')} activations: it fixes a static range")
        found.pop("observer", None)
    elif found.get("observer") == "percentile" and percentile is not None:
        found["observer"] = {"method": "percentile", "percentile": percentile}
    return found


Activations = Annotated[
    Dynamic | Static | Unquantized,
    Field(discriminator="mode"),
    BeforeValidator(_one_observer),  # validators that come before run from the last to the first
    ShortFor("mode", "dynamic"),
]


class Osl(Strict):
    """The exponent of OutlierSuppressionLite's search; `osl` of the recipe says whose search."""

    method: Literal["osl"]


class SmoothQuant(Strict):
    """SmoothQuant with one exponent everywhere."""

    method: Literal["smoothquant"]
    alpha: float = Field(default=0.5, ge=0, le=1)


class NoSmoothing(Strict):
    method: Literal["none"]


Smoothing = Annotated[Osl | SmoothQuant | NoSmoothing, Field(discriminator="method"), ShortFor("method")]


class Nearest(Strict):
    method: Literal["nearest"]


class Gptq(Strict):
    """Each column's error moves on to the columns still to come."""

    method: Literal["gptq"]


Rounding = Annotated[Nearest | Gptq, Field(discriminator="method"), ShortFor("method")]

_PARTS_OF_A_SCHEME = ("weights", "activations")
_ACTIVATIONS: TypeAdapter[Activations] = TypeAdapter(Activations)


class Policy(Strict):
    """What happens to the linear layers whose full name matches `layers`.

    A mapping to validate may also hold `scheme`, a name of `qtool.scheme.PRESETS`, for weights and activations.
    """

    layers: Regex
    quantize: bool = Field(default=True, description="false leaves the layer as it is")
    weights: Weights = Weights()
    activations: Activations = Dynamic(mode="dynamic")
    smoothing: Smoothing = Osl(method="osl")
    clip: bool = Field(default=True, description="search a clipping ratio for each scale")
    rounding: Rounding = Gptq(method="gptq")

    @model_validator(mode="before")
    @classmethod
    def _other_spellings(cls, data: Any) -> Any:
        return _with_preset(_with_alpha(data)) if isinstance(data, dict) else data

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if "scheme" not in given:
            return
        name = given["scheme"]
        if not isinstance(name, str) or named(name) is None:
            yield "scheme", f"must be one of {', '.join(PRESETS)}, not {short(name)}"
        for key in _PARTS_OF_A_SCHEME:
            if key in given:
                yield key, "is already given by scheme"

    @property
    def scheme(self) -> Scheme:
        """How these layers are quantized."""
        return Scheme(self.weights.args, self.activations.args)

    def with_scheme(self, scheme: Scheme) -> Policy:
        """The same with weights and activations of a scheme of `qtool.scheme.PRESETS` or one like it."""
        parts = _of_scheme(scheme)
        return self.model_copy(
            update={
                "weights": Weights.model_validate(parts["weights"]),
                "activations": _ACTIVATIONS.validate_python(parts["activations"]),
            }
        )

    def with_mode(self, mode: str) -> Policy:
        """The same with activations static or dynamic."""
        if mode == self.activations.mode:
            return self
        return self.model_copy(
            update={"activations": Static(mode="static") if mode == "static" else Dynamic(mode="dynamic")}
        )


def _with_preset(data: dict[str, Any]) -> dict[str, Any]:
    if "scheme" not in data:
        return data
    name, rest = data["scheme"], {key: value for key, value in data.items() if key != "scheme"}
    preset = named(name) if isinstance(name, str) else None
    if preset is None or any(key in rest for key in _PARTS_OF_A_SCHEME):  # see Policy.disagreements
        return rest
    return rest | _of_scheme(preset)


def _of_scheme(scheme: Scheme) -> dict[str, Any]:
    """The keys of a policy that say a scheme."""
    weights = scheme.weights
    return {
        "weights": {
            "num_bits": weights.num_bits,
            "type": weights.type,
            "strategy": weights.strategy,
            "group_size": weights.group_size,
            "symmetric": weights.symmetric,
        },
        "activations": {"mode": _mode(scheme)},
    }


def _mode(scheme: Scheme) -> str:
    if scheme.activations is None:
        return "float"
    return "static" if scheme.is_static else "dynamic"


def _with_alpha(data: dict[str, Any]) -> dict[str, Any]:
    """SmoothQuant's alpha used to be a key of the policy, which meant nothing to other methods."""
    smoothing = data.get("smoothing", "osl")
    if "smoothquant_alpha" not in data or not isinstance(smoothing, str):
        return data
    rest = {key: value for key, value in data.items() if key != "smoothquant_alpha"}
    if smoothing == "smoothquant":
        rest["smoothing"] = {"method": smoothing, "alpha": data["smoothquant_alpha"]}
    return rest
