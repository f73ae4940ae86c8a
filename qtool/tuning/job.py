"""What is asked of the process that measures sensitivities, and what it finds: typed, and JSON in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.engines import native
from qtool.engines.job import CalibrationText
from qtool.environments.lookup import interpreter
from qtool.evaluation.job import EvaluationText
from qtool.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class SensitivityJob:
    """What to measure: every group and linear of a float checkpoint.

    Attributes:
        model: the checkpoint's folder.
        recipe, scheme: how to quantize.
        format: of the quantized model.
        modes: further ways: the scheme with activations static, or dynamic, everywhere; none: the scheme as it is.
        precisions: the ways in place of these: presets by their names, each everywhere.
        text: to estimate the divergence on.
        calibration: for the quantizer; another text.
        trust_remote_code: allow the checkpoint's own modelling code.
    """

    model: Path
    recipe: Recipe
    scheme: str
    format: str
    modes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    text: EvaluationText
    calibration: CalibrationText
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "model": str(self.model),
            "recipe": self.recipe.model_dump(mode="json"),
            "text": asdict(self.text),
            "calibration": asdict(self.calibration),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SensitivityJob:
        return cls(
            **{
                **content,
                "model": Path(content["model"]),
                "recipe": Recipe.model_validate(content["recipe"]),
                "modes": tuple(content["modes"]),
                "precisions": tuple(content["precisions"]),
                "text": EvaluationText(**content["text"]),
                "calibration": CalibrationText(**content["calibration"]),
            }
        )


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one linear, or several at once, does when all else is float.

    Attributes:
        linears: full names.
        way: the key of the policies that it was quantized by.
        activations: static, dynamic or float.
        alpha: the smoothing's exponent; None without smoothing.
        relative_error: squared error of the output over its square.
        kl: the estimated KL divergence of the model's output from the float model's, nats per token.
        bytes: of their weights and scales.
    """

    linears: list[str]
    way: str
    activations: str
    alpha: float | None
    relative_error: float
    kl: float
    bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """Sensitivities in the model's order, the ways of each together.

    Attributes:
        groups: of linears that share their input. All routed experts of a layer are one group: runtimes run them as
            one.
        linears: of single linears.
    """

    groups: list[Sensitivity]
    linears: list[Sensitivity]


@dataclass(frozen=True)
class LinearBytes:
    """Size of a linear's weight, as a float and quantized with its scales."""

    float: int
    quantized: int


@dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """What was measured.

    Attributes:
        bytes: of every linear in the decoder layers, by its full name.
        total_bytes: of the whole checkpoint under the scheme.
        group_size: of the precisions that have groups of input channels; None where no size fits all linears.
        input_bytes: of the float checkpoint.
        text, calibration: what they were, for reports.
        seconds, peak_memory_bytes: of the process.
    """

    measured: Measured
    bytes: dict[str, LinearBytes]
    total_bytes: int
    input_bytes: int
    group_size: int | None = None
    text: dict[str, Any]
    calibration: dict[str, Any]
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As `qtool tune --json` prints it."""
        rest = {key: value for key, value in vars(self).items() if key not in ("measured", "bytes")}
        sizes = {name: [size.float, size.quantized] for name, size in self.bytes.items()}
        return {**asdict(self.measured), "bytes": sizes, **rest}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sensitivities:
        groups, linears = ([Sensitivity(**row) for row in content[key]] for key in ("groups", "linears"))
        return cls(
            measured=Measured(groups, linears),
            bytes={name: LinearBytes(*size) for name, size in content["bytes"].items()},
            **{key: content[key] for key in cls.__dataclass_fields__ if key not in ("measured", "bytes")},
        )


def run(job: SensitivityJob, on_event: Callable[[workers.Event], None]) -> Sensitivities:
    """Measure in a process of its own.

    Raises:
        InputError: a checkpoint that is quantized or can't be run, or too little text.
        QtoolError: the model's hidden states are not finite, or the process fails.
    """
    python, env = interpreter("native"), native.environment()
    return Sensitivities.from_json(
        workers.run("qtool.tuning.worker", job.to_json(), python=python, env=env, on_event=on_event)
    )
