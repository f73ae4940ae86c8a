"""What an engine made, or would make: typed, as JSON on its way between processes, and as users read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtool.version import __version__


@dataclass(frozen=True)
class QuantizedGroup:
    """Linears that share their input, and how they came out.

    Attributes:
        layer: the decoder layer's name.
        linears: by their names inside it.
        activations: static or dynamic.
        smoothing: the method, or none.
        alpha: the exponent that was found or given for smoothing, if any.
        relative_error: squared error of the linears' output relative to its square; None where nobody measured it.
        input, smoothed: range of the input before and after smoothing, as low, high and typical; None likewise.
        static_cost: expected squared error with static activations over that with a scale per token; None where there
            was no choice between them.
    """

    layer: str
    linears: list[str]
    activations: str
    smoothing: str
    alpha: float | None
    relative_error: float | None = None
    input: dict[str, float] | None = None
    smoothed: dict[str, float] | None = None
    static_cost: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None or key == "alpha"}


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens the routed experts of a layer saw.

    Attributes:
        layer: its name.
        tokens: per expert, by the router.
        topped_up: expert number to how many further ones its statistics took.
    """

    layer: str
    tokens: list[int]
    topped_up: dict[str, int]


@dataclass(frozen=True)
class LeftFloat:
    """Linears of the decoder layers that stay float.

    Attributes:
        layers: their names, numbers replaced by *.
        why: in words.
        count: how many.
        share: of the weights of all linears of the decoder layers, 0 to 1.
    """

    layers: str
    why: str
    count: int
    share: float


@dataclass(frozen=True)
class CalibrationUsed:
    """The text of the calibration: where it is from, SHA-256 of its token ids, and its size."""

    source: str
    sha256: str
    samples: int
    seq_len: int


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """How a checkpoint was quantized: its qtool.json.

    Attributes:
        qtool, versions: versions of qtool and of what it computed with.
        engine, device: who quantized, and on what.
        threads: of a process; None where the engine doesn't say.
        source: the float model's folder, its last part.
        origin: where that was downloaded from, if qtool knows.
        format, recipe, scheme: of the job; the recipe as JSON.
        layers: every group of linears that was quantized.
        experts: one entry per layer that has routed ones.
        left_float: linears of the decoder layers that stay float; empty where the engine doesn't say.
        seconds, peak_memory_bytes: of the engine's process. The native engine leaves them to `QuantizationResult`:
            its qtool.json is the same for the same job, however it ran.
    """

    qtool: str = __version__
    versions: dict[str, str]
    engine: str
    device: str
    threads: int | None = None
    source: str
    origin: dict[str, str] | None
    format: str
    recipe: dict[str, Any]
    scheme: str
    calibration: CalibrationUsed
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    layers: list[QuantizedGroup]
    experts: list[ExpertTokens] = field(default_factory=list)
    left_float: list[LeftFloat] = field(default_factory=list)

    @property
    def mean_relative_error(self) -> float | None:
        """Over all groups; None where nobody measured it."""
        errors = [group.relative_error for group in self.layers if group.relative_error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def choice(self) -> str | None:
        """Where activations could be static or per token, which became so, in words; None where there was no choice."""
        static: dict[str, list[bool]] = {}
        for group in self.layers:
            if group.static_cost is not None:
                names = ", ".join(name.rpartition(".")[2] for name in group.linears)
                static.setdefault(names, []).append(group.activations == "static")
        if not static:
            return None
        parts = [f"of {names} in {sum(found)} of {len(found)} layers" for names, found in static.items()]
        return (
            f"static activations {', '.join(parts)}; in the others a scale per token, "
            "where static ones would cost more than 1.5 times the error"
        )

    def to_json(self) -> dict[str, Any]:
        error = self.mean_relative_error
        return {
            "qtool": self.qtool,
            "versions": self.versions,
            "engine": self.engine,
            "device": self.device,
            **({} if self.threads is None else {"threads": self.threads}),
            "source": self.source,
            "origin": self.origin,
            "format": self.format,
            "recipe": self.recipe,
            "scheme": self.scheme,
            "calibration": asdict(self.calibration),
            **({} if self.seconds is None else {"seconds": self.seconds}),
            **({} if self.peak_memory_bytes is None else {"peak_memory_bytes": self.peak_memory_bytes}),
            **({} if error is None else {"mean_relative_error": error}),
            **({} if self.choice is None else {"activations": self.choice}),
            "layers": [group.to_json() for group in self.layers],
            **({"experts": [asdict(layer) for layer in self.experts]} if self.experts else {}),
            **({"left_float": [asdict(each) for each in self.left_float]} if self.left_float else {}),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> QuantizationReport:
        known = {key: content[key] for key in cls.__dataclass_fields__ if key in content}
        return cls(
            **known
            | {
                "calibration": CalibrationUsed(**content["calibration"]),
                "layers": [QuantizedGroup(**group) for group in content["layers"]],
                "experts": [ExpertTokens(**layer) for layer in content.get("experts", [])],
                "left_float": [LeftFloat(**each) for each in content.get("left_float", [])],
            }
        )


@dataclass(frozen=True)
class QuantizationResult:
    """A finished quantization.

    Attributes:
        report: what the checkpoint's qtool.json says.
        output: the checkpoint's folder.
        input_bytes, output_bytes: of the tensors before and after.
        seconds, peak_memory_bytes: of the engine's process.
    """

    report: QuantizationReport
    output: Path
    input_bytes: int
    output_bytes: int
    seconds: float
    peak_memory_bytes: int

    def printed(self) -> dict[str, Any]:
        """As `qtool quantize --json` prints it: all in one."""
        return self.report.to_json() | {
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "output": str(self.output),
            "output_bytes": self.output_bytes,
            "input_bytes": self.input_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"report": self.report.to_json(), "output": str(self.output)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> QuantizationResult:
        report = QuantizationReport.from_json(content["report"])
        return cls(**content | {"report": report, "output": Path(content["output"])})


@dataclass(frozen=True)
class LayersSummary:
    """Linears that are treated alike.

    Attributes:
        layers: their names, numbers replaced by *.
        count: how many.
        policy: in words.
    """

    layers: str
    count: int
    policy: str


@dataclass(frozen=True)
class EstimatedResources:
    """What a job will take: seconds and peak memory of its process, disk beside the output, tokens at a time."""

    estimated_seconds: float
    estimated_peak_bytes: int
    scratch_bytes: int
    batch_tokens: int


@dataclass(frozen=True)
class LaunchOfCards:
    """How MindFormers would be started on several cards: its YAML, and msrun's command line."""

    yaml: str
    msrun: str


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a job would do.

    Attributes:
        layers: what becomes of which linears.
        left_float: those that stay float, with their share; empty where the engine doesn't say.
        calibration: data, samples and seq_len.
        input_bytes, output_bytes: of the tensors before and after.
        resources: where the engine estimates them (native).
        launch: where the engine starts several cards (golden-stick).
    """

    layers: list[LayersSummary]
    left_float: list[LeftFloat] = field(default_factory=list)
    calibration: dict[str, Any]
    input_bytes: int
    output_bytes: int
    resources: EstimatedResources | None = None
    launch: LaunchOfCards | None = None

    def printed(self) -> dict[str, Any]:
        """As `qtool quantize --dry-run --json` prints it: all in one."""
        content = asdict(self)
        resources, launch = content.pop("resources"), content.pop("launch")
        return {**content, **(resources or {}), **(launch or {})}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DryRun:
        resources, launch = content["resources"], content["launch"]
        return cls(
            **content
            | {
                "layers": [LayersSummary(**row) for row in content["layers"]],
                "left_float": [LeftFloat(**each) for each in content["left_float"]],
                "resources": resources and EstimatedResources(**resources),
                "launch": launch and LaunchOfCards(**launch),
            }
        )
