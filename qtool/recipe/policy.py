"""What a recipe says of some linear layers: their weights, activations, smoothing and rounding.

Where there is a choice of methods, `method` (of activations: `mode`) says which, and the other keys are those of that
one; a string is short for a method without further keys. Recipes and qtool.json files of earlier versions, which had
those keys elsewhere, still load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter, model_validator

from qtool.recipe.strict import Regex, ShortFor, Strict, wrong
from qtool.recipe.words import short
from qtool.scheme import PRESETS, QuantizationArgs, Scheme, named

_SIZES = {"group_size": "group", "block_structure": "block"}


class Weights(Strict):
    """How weights are stored, in the terms of `qtool.scheme`: as integers, or 8-bit floating point (e4m3)."""

    num_bits: int = Field(default=8, ge=2, le=8)
    type: Literal["int", "float"] = "int"
    strategy: Literal["tensor", "channel", "group", "block"] = Field(
        default="channel", description="what shares a scale"
    )
    group_size: int | None = Field(default=None, gt=0, description="for group: input channels that share a scale")
    block_structure: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="for block: rows and columns that share a scale"
    )
    symmetric: bool = Field(
        default=True, description="false: integers with a zero point for each scale, of output channels or groups"
    )

    @model_validator(mode="before")
    @classmethod
    def _group_size_says_group(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key, strategy in _SIZES.items():
                if data.get(key) is not None:
                    return {"strategy": strategy, **data}
        return data

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        size, strategy = given.get("group_size"), given.get("strategy")
        if given.get("symmetric") is False and (given.get("type") == "float" or strategy in ("tensor", "block")):
            yield "symmetric", "can be false only for integers with strategy channel or group"
        if strategy == "group" and size is None:
            yield "group_size", "is missing, but strategy group needs it"
        if strategy in ("tensor", "channel", "block") and size is not None:
            yield "group_size", f"has no meaning with strategy {strategy}"
        blocks = given.get("block_structure")
        if strategy == "block" and blocks is None:
            yield "block_structure", "is missing, but strategy block needs it"
        if strategy in ("tensor", "channel", "group") and blocks is not None:
            yield "block_structure", f"has no meaning with strategy {strategy}"
        if size is not None and blocks is not None and strategy is None:
            yield "block_structure", "stands beside group_size: a weight has groups or blocks"
        if given.get("type", "int") == "int" and (strategy == "block" or blocks is not None):
            yield "block_structure", "is for type: float"
        if given.get("type") == "float" and (strategy in ("tensor", "group") or size is not None):
            yield "strategy", "of type: float is channel or block"
        if given.get("type") == "float" and given.get("num_bits", 8) != 8:
            yield "num_bits", "of type: float is 8"

    @property
    def args(self) -> QuantizationArgs:
        return QuantizationArgs(
            num_bits=self.num_bits,
            type=self.type,
            strategy=self.strategy,
            group_size=self.group_size,
            block_structure=self.block_structure,
            symmetric=self.symmetric,
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
    type: Literal["int", "float"] = Field(default="int", description="8-bit integers, or floating point (e4m3)")
    group_size: int | None = Field(
        default=None, gt=0, description="channels of a token that share a scale; for floating point"
    )
    symmetric: Literal[True, False, "auto"] = Field(
        default=True,
        description="false: integers with a zero point per token; auto: that where the output's format has it",
    )

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if given.get("group_size") is not None and given.get("type", "int") == "int":
            yield "group_size", "is for type: float"
        if given.get("symmetric") in (False, "auto") and given.get("type", "int") == "float":
            yield "symmetric", "can't be false with type: float"

    @property
    def args(self) -> QuantizationArgs:
        """With `symmetric: auto` those that every format has."""
        return QuantizationArgs(
            type=self.type,
            strategy="token" if self.group_size is None else "group",
            group_size=self.group_size,
            symmetric=self.symmetric is not False,
            dynamic=True,
        )


class Static(Strict):
    """One scale and zero point for the whole tensor; its range is fixed in calibration."""

    mode: Literal["static"]
    observer: Observer = Field(default=MinMax(method="minmax"), description="how the range is chosen")

    @property
    def args(self) -> QuantizationArgs:
        return QuantizationArgs(strategy="tensor", symmetric=False)


class Auto(Strict):
    """Static where calibration finds that this costs little, and else a scale per token; the engine decides it for
    linears that share their input."""

    mode: Literal["auto"]
    symmetric: Literal[True, False, "auto"] = Field(default="auto", description="of those with a scale per token")

    @property
    def ways(self) -> tuple[Static, Dynamic]:
        """What there is to choose from."""
        return Static(mode="static"), Dynamic(mode="dynamic", symmetric=self.symmetric)

    @property
    def args(self) -> QuantizationArgs:
        """Those of static activations, which fewer runtimes take."""
        return self.ways[0].args


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
    Dynamic | Static | Auto | Unquantized,
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
        return _for_floats(_with_preset(_with_alpha(data))) if isinstance(data, dict) else data

    @classmethod
    def disagreements(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if _stores_floats(_with_preset(dict(given))):
            if given.get("smoothing") in ("osl", {"method": "osl"}):
                yield "smoothing", "osl is for integers only; floating point is not smoothed"
            if given.get("clip") is True:
                yield "clip", "is for integers; floating point keeps its range"
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
        """The same with weights and activations of a scheme of `qtool.scheme.PRESETS` or one like it.

        Smoothing and clipping, which are for integers, go where weights become floating point.
        """
        parts = _of_scheme(scheme)
        update: dict[str, Any] = {
            "weights": Weights.model_validate(parts["weights"]),
            "activations": _ACTIVATIONS.validate_python(parts["activations"]),
        }
        if scheme.weights.type == "float":
            update |= {"smoothing": NoSmoothing(method="none"), "clip": False}
        return self.model_copy(update=update)

    def settled(self, expresses: Callable[[Scheme], bool], *, measures: bool = False) -> Policy:
        """The same without `symmetric: auto`, and without `mode: auto` unless it can be decided later.

        Args:
            expresses: whether the output's format can hold a layer of this scheme.
            measures: whoever quantizes decides `mode: auto`; else it means static.
        """
        activations = self.activations
        if activations.mode == "auto":
            static, dynamic = self.ways
            dynamic = dynamic.settled(expresses)
            if not expresses(static.scheme):
                return dynamic
            if not measures or not expresses(dynamic.scheme) or dynamic.activations.mode != "dynamic":
                return static
            symmetric = dynamic.activations.symmetric
            return self.model_copy(update={"activations": activations.model_copy(update={"symmetric": symmetric})})
        if activations.mode != "dynamic" or activations.symmetric != "auto":
            return self
        with_zero_point, without = (
            self.model_copy(update={"activations": activations.model_copy(update={"symmetric": symmetric})})
            for symmetric in (False, True)
        )
        return with_zero_point if expresses(with_zero_point.scheme) else without

    @property
    def ways(self) -> tuple[Policy, Policy]:
        """Of `mode: auto`, the same with static and with dynamic activations. Raises ValueError for other modes."""
        if self.activations.mode != "auto":
            raise ValueError(f"activations are {self.activations.mode}")
        static, dynamic = self.activations.ways
        return self.model_copy(update={"activations": static}), self.model_copy(update={"activations": dynamic})

    def measured(self) -> Policy:
        """The same with `mode: auto` where activations are static by minimum and maximum."""
        activations = self.activations
        if activations.mode != "static" or activations.observer.method != "minmax":
            return self
        return self.model_copy(update={"activations": Auto(mode="auto")})

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
            "block_structure": weights.block_structure,
            "symmetric": weights.symmetric,
        },
        "activations": _of_inputs(scheme.activations),
    }


def _of_inputs(args: QuantizationArgs | None) -> dict[str, Any]:
    if args is None:
        return {"mode": "float"}
    if not args.dynamic:
        return {"mode": "static"}
    if args.type == "float":
        return {"mode": "dynamic", "type": args.type, "group_size": args.group_size}
    return {"mode": "dynamic"} if args.symmetric else {"mode": "dynamic", "symmetric": False}


def _stores_floats(data: Mapping[str, Any]) -> bool:
    weights = data.get("weights")
    return weights.get("type") == "float" if isinstance(weights, Mapping) else False


def _for_floats(data: dict[str, Any]) -> dict[str, Any]:
    """Floating-point weights are neither smoothed nor clipped, unless the recipe says so."""
    return {"smoothing": "none", "clip": False, **data} if _stores_floats(data) else data


def _with_alpha(data: dict[str, Any]) -> dict[str, Any]:
    """SmoothQuant's alpha used to be a key of the policy, which meant nothing to other methods."""
    smoothing = data.get("smoothing", "osl")
    if "smoothquant_alpha" not in data or not isinstance(smoothing, str):
        return data
    rest = {key: value for key, value in data.items() if key != "smoothquant_alpha"}
    if smoothing == "smoothquant":
        rest["smoothing"] = {"method": smoothing, "alpha": data["smoothquant_alpha"]}
    return rest
