"""What an engine is asked to do: typed on both sides of the pipe to the engine's process, JSON in between."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class CalibrationTokens:
    """Calibration text that is tokenized already.

    Attributes:
        ids: token ids, samples of equal length.
        digest: SHA-256 of the ids, in hex.
        source: where the text comes from, for reports.
    """

    ids: list[list[int]]
    digest: str
    source: str


@dataclass(frozen=True)
class CalibrationText:
    """What a model is calibrated on.

    Attributes:
        data: builtin, self, or the path of a .txt, .jsonl or .parquet file.
        samples, seq_len: how many samples of how many tokens.
        seed: for everything random.
        tokens: the text itself, where somebody has tokenized it before; `data` then only says how it came about.
    """

    data: str
    samples: int
    seq_len: int
    seed: int = 0
    tokens: CalibrationTokens | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> CalibrationText:
        """As the recipe has it."""
        wanted = recipe.calibration
        return cls(wanted.data, wanted.samples, wanted.seq_len, wanted.seed)

    def shown(self) -> dict[str, Any]:
        """For a dry run's result."""
        return {"data": self.data, "samples": self.samples, "seq_len": self.seq_len}


@dataclass(frozen=True)
class OutputFolder:
    """Where the quantized checkpoint goes.

    Attributes:
        path: the folder to make.
        format: of the checkpoint.
        overwrite: replace what is there.
        resume: go on where an earlier run of the same job ended (native engine).
        restart: with `resume`, start over where the earlier run was of another job, rather than refuse.
    """

    path: Path
    format: str
    overwrite: bool = False
    resume: bool = False
    restart: bool = False


@dataclass(frozen=True)
class Resources:
    """What the native engine may use.

    Attributes:
        memory: bytes of a process, or None for whatever it takes.
        workers: processes that quantize, besides the one that runs the layers; 0 does all in that one.
        ray: address of a Ray cluster whose workers quantize instead, or None.
        threads: of each process; None takes the cores there are. The result depends on it in the last bits.
        device_memory: bytes of a GPU or NPU that each process may take, or None for what is free there.
    """

    memory: int | None = None
    workers: int = 0
    ray: str | None = None
    threads: int | None = None
    device_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizationJob:
    """One quantization.

    Attributes:
        model: the checkpoint's folder.
        recipe, scheme: how; the scheme is one of the recipe's.
        device: auto, cpu, cuda or npu.
        devices: cards of this machine; None for one, and with golden-stick for the recipe's.
        trust_remote_code: allow the checkpoint's own modelling code.
    """

    model: Path
    output: OutputFolder
    recipe: Recipe
    scheme: str
    calibration: CalibrationText
    device: str = "auto"
    devices: int | None = None
    trust_remote_code: bool = False
    resources: Resources = Resources()

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name != "recipe"},
            "model": str(self.model),
            "output": {**asdict(self.output), "path": str(self.output.path)},
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration": asdict(self.calibration),
            "resources": asdict(self.resources),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> QuantizationJob:
        from qtool.recipe.schema import Recipe

        output, calibration = OutputFolder(**content["output"]), CalibrationText(**content["calibration"])
        tokens = content["calibration"]["tokens"]
        return cls(
            **content
            | {
                "model": Path(content["model"]),
                "output": replace(output, path=Path(output.path)),
                "recipe": Recipe.model_validate(content["recipe"]),
                "calibration": replace(calibration, tokens=tokens and CalibrationTokens(**tokens)),
                "resources": Resources(**content["resources"]),
            }
        )
