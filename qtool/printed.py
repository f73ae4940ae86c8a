"""What each command prints with --json: its keys and their types, of which `qtool schema` makes JSON Schemas.

Keys stay as they are from one version to the next; new ones may come. A key with a default here can be missing. The
tests hold every command's real output against these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from qtool.engines.report import CalibrationUsed, ExpertTokens, LayersSummary, LeftFloat, QuantizedGroup
from qtool.environments.variables import Variable
from qtool.errors import Code
from qtool.evaluation.intervals import Estimate
from qtool.evaluation.job import Figures, RuntimeUsed, TextUsed
from qtool.runtimes.table import Row, Way
from qtool.tuning.job import Sensitivity


@dataclass(frozen=True)
class ErrorObject:
    """An error.

    `code` says of what kind: input (change something before trying again), usage (the command line is wrong), foreign
    (another library can't read the input), failed (it may work the next time), worker_died (a process was killed),
    interrupted, or bug. `message` is what went wrong, `where` the file, tensor, line or option, `hint` what to do next.
    """

    code: Code
    message: str
    where: str | None
    hint: str | None


@dataclass(frozen=True)
class Failed:
    """Any command that fails, unless it has printed a result already."""

    error: ErrorObject


# ------------------------------------------------------------------ eval


@dataclass(frozen=True)
class Made:
    """How a model was quantized, by its qtool.json; null where nobody says."""

    format: str
    recipe: str | None
    scheme: str | None
    engine: str | None
    qtool: str | None


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors, by what they are."""

    base: dict[str, int]
    quantized: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Evaluated(Figures):
    """`qtool eval` of one model; of several it prints a list of these."""

    base: str
    quantized: str
    text: TextUsed
    runtime: RuntimeUsed
    date: str
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    sizes: Sizes
    made: Made
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class Solved:
    """`qtool eval --tasks`: one of a list, by model."""

    model: str
    tasks: dict[str, dict[str, Estimate]]
    documents: dict[str, int]


# ------------------------------------------------------------------ quantize, analyze, tune


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """`qtool quantize`: what is in the checkpoint's qtool.json, and what the run took."""

    qtool: str
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
    mean_relative_error: float | None = None
    activations: str | None = None
    layers: list[QuantizedGroup]
    experts: list[ExpertTokens] | None = None
    left_float: list[LeftFloat] | None = None
    seconds: float
    peak_memory_bytes: int
    output: str
    output_bytes: int
    input_bytes: int
    pushed: Uploaded | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """`qtool quantize --dry-run`. Estimates come from the native engine, yaml and msrun from golden-stick."""

    layers: list[LayersSummary]
    left_float: list[LeftFloat]
    calibration: dict[str, Any]
    input_bytes: int
    output_bytes: int
    output: str | None = None
    estimated_seconds: float | None = None
    estimated_peak_bytes: int | None = None
    scratch_bytes: int | None = None
    batch_tokens: int | None = None
    yaml: str | None = None
    msrun: str | None = None


@dataclass(frozen=True)
class RankedLinear:
    name: str
    way: str
    activations: str
    alpha: float | None
    relative_error: float
    kl: float
    bytes_saved: int


@dataclass(frozen=True)
class UniformWay:
    """All linears quantized in one way: the estimate, and bytes of their weights and scales."""

    kl: float
    bytes: int


@dataclass(frozen=True)
class Analyzed:
    """`qtool analyze`: the linears, the costliest first. `kl_of_all` has each group in the way that costs least."""

    model: str
    recipe: str
    scheme: str
    text: dict[str, Any]
    calibration: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    kl_of_all: float
    ways: dict[str, UniformWay]
    linears: list[RankedLinear]


@dataclass(frozen=True)
class TriedScheme:
    kl_divergence: Estimate
    top1_agreement: Estimate
    perplexity_ratio: Estimate
    predicted_kl: float
    bytes: int


@dataclass(frozen=True)
class ChangedGroup:
    linears: list[str]
    before: Annotated[str, Field(alias="from")]
    after: Annotated[str, Field(alias="to")]
    kl: float


@dataclass(frozen=True)
class Sensitivities:
    """Bytes are those of each linear as a float and quantized by the scheme."""

    groups: list[Sensitivity]
    linears: list[Sensitivity]
    bytes: dict[str, tuple[int, int]]
    total_bytes: int
    input_bytes: int
    group_size: int | None
    text: dict[str, Any]
    calibration: dict[str, Any]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class FrontierPoint:
    """The least KL divergence that is estimated for so many bytes of tensors."""

    bytes: int
    predicted_kl: float


@dataclass(frozen=True)
class Tuned:
    """`qtool tune`: the recipe as YAML, and how it was found."""

    recipe: str
    reached: bool
    reference: TriedScheme
    tuned: TriedScheme
    evaluations: int
    changed: list[ChangedGroup]
    frontier: list[FrontierPoint]
    sensitivity: Sensitivities


# ------------------------------------------------------------------ inspect, convert, generate, run


@dataclass(frozen=True)
class LayerGroup:
    layers: str
    count: int
    scheme: str
    shape: list[int]


@dataclass(frozen=True)
class Inspected:
    """`qtool inspect`."""

    path: str
    architecture: str | None
    model_type: str | None
    format: str
    dtype: str | None
    parameters: int | None
    tensors: int
    files: int
    bytes: int
    bytes_on_disk: int
    bytes_bf16: int | None
    kv_cache: str | None
    layers: list[LayerGroup]
    runtimes: list[Way]


@dataclass(frozen=True)
class Tensor:
    """One line of `qtool inspect --tensors`. min and max are of the finite numbers."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str
    min: float | None
    max: float | None
    nonfinite: int
    scheme: str | None = None
    scale_min: float | None = None
    scale_max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Converted:
    """`qtool convert`. architecture, parameters and dtype are of a GGUF file that was converted, rounded (tensors that
    were rounded anew) and scale_rounding of one that was made, the others of a checkpoint. weight_rounding is the
    relative change, root mean square, of the weights that --scheme rounded again."""

    output: str
    nbytes: int
    source_format: Annotated[str | None, Field(alias="from")] = None
    to: str | None = None
    layers: dict[str, Any] | None = None
    integers: int | None = None
    input_scale_rounding: float | None = None
    weight_rounding: float | None = None
    rounded: list[str] | None = None
    scale_rounding: float | None = None
    seconds: float | None = None
    architecture: str | None = None
    parameters: int | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of `qtool generate`, besides the fields of the prompt's own line. Lines of an OpenAI batch have that
    format's shape instead."""

    prompt: Any = None
    messages: Any = None
    text: str | None = None
    finish_reason: str | None = None
    choices: list[dict[str, Any]] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning: str | None = None
    logprobs: Any = None
    prompt_logprobs: Any = None
    error: str | None = None


@dataclass(frozen=True)
class CheckpointMade:
    path: str
    bytes: int


@dataclass(frozen=True)
class Stage:
    name: str
    status: Literal["done", "kept"]
    seconds: float | None
    output: str


@dataclass(frozen=True)
class Ran:
    """`qtool run`. eval has the figures of `qtool eval`, answers those of `qtool generate`."""

    recipe: str
    scheme: str
    work: str
    model: str
    checkpoints: dict[str, CheckpointMade]
    stages: list[Stage]
    eval: dict[str, Any] | None
    answers: list[dict[str, Any]] | None


# ------------------------------------------------------------------ hubs


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """`qtool download`; bytes_there is of --dry-run."""

    path: str
    hub: str
    endpoint: str
    repo: str
    revision: str | None
    commit: str
    bytes: int
    files: dict[str, int]
    bytes_there: int | None = None


@dataclass(frozen=True)
class Uploaded:
    """`qtool upload`."""

    url: str
    hub: str
    repo: str
    commit: str | None
    sent: list[str]
    skipped: list[str]


# ------------------------------------------------------------------ recipes, environments


@dataclass(frozen=True)
class ListedRecipe:
    """`qtool recipes list`: one of a list."""

    name: str
    description: str
    source: str | None
    match: dict[str, Any]
    default_scheme: str
    schemes: list[str]


@dataclass(frozen=True)
class RecipeProblem:
    file: str
    line: int | None
    key: str
    message: str


@dataclass(frozen=True)
class ValidatedRecipe:
    """`qtool recipes validate`: one of a list, by file."""

    file: str
    valid: bool
    name: str | None
    schemes: list[str]
    problems: list[RecipeProblem]


@dataclass(frozen=True)
class Environment:
    """`qtool env list`: one of a list. `for` says what it is for."""

    name: str
    state: str
    purpose: Annotated[str, Field(alias="for")]
    engines: list[str]
    python: str | None
    named_in: str | None
    folder: str | None
    python_version: str | None
    packages: dict[str, str] | None
    bytes: int | None


@dataclass(frozen=True, kw_only=True)
class TriedEngine:
    name: str
    kind: str
    works: bool
    python: str | None
    source: str | None
    versions: dict[str, str]
    problem: str | None
    missing: str | None
    note: str | None
    python_version: str | None = None
    cuda: Any = None


@dataclass(frozen=True)
class Settings:
    """The configuration file. `problem` is what is wrong with it."""

    file: str
    exists: bool
    problem: str | None


@dataclass(frozen=True)
class Examined:
    """`qtool doctor`."""

    qtool: str
    python: dict[str, str]
    machine: dict[str, Any]
    engines: list[TriedEngine]
    works: bool
    to_do: str | None
    configuration: Settings


@dataclass(frozen=True)
class Set:
    """A default that the user has set. `source` is a line of the configuration file, or a variable."""

    command: str
    option: str
    value: Any
    source: str


@dataclass(frozen=True)
class Configuration:
    """What `qtool config` prints."""

    file: str
    exists: bool
    values: list[Set]


# name as of `qtool schema`: type of the whole output, or of each line where it has several
SCHEMAS: dict[str, Any] = {
    "error": Failed,
    "eval": Evaluated | list[Evaluated],
    "eval-tasks": list[Solved],
    "quantize": Quantized,
    "quantize-dry-run": Planned,
    "analyze": Analyzed,
    "tune": Tuned,
    "inspect": Inspected,
    "inspect-tensors": Tensor,
    "convert": Converted,
    "generate": Answer,
    "run": Ran,
    "download": Downloaded,
    "upload": Uploaded,
    "runtimes": list[Row],
    "runtimes-model": list[Way],
    "recipes-list": list[ListedRecipe],
    "recipes-validate": list[ValidatedRecipe],
    "config": Configuration,
    "env-list": list[Environment],
    "env-vars": list[Variable],
    "doctor": Examined,
}
