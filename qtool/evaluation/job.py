"""What an evaluation is asked for and what it finds: typed on both sides of the pipe to its process, JSON between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qtool import workers
from qtool.engines import native
from qtool.environments.lookup import interpreter
from qtool.evaluation.intervals import Estimate


@dataclass(frozen=True)
class EvaluationText:
    """Text to predict: window i is its tokens i·length to (i+1)·length - 1.

    Attributes:
        data: builtin, or the path of a .txt, .jsonl or .parquet file.
        windows: how many.
        length: tokens of each.
    """

    data: str
    windows: int
    length: int


@dataclass(frozen=True)
class Vllm:
    """vLLM on this machine.

    Attributes:
        python: its interpreter.
        engine: its arguments.
        env: variables to set for it.
    """

    python: str
    engine: dict[str, Any]
    env: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ComparisonJob:
    """Quantized models against their base.

    Attributes:
        base, quantized: the checkpoints' folders.
        vllm: for each quantized model vLLM as it runs that; empty has qtool run them, layer by layer.
        trust_remote_code: allow the checkpoints' own modelling code.
    """

    base: Path
    quantized: tuple[Path, ...]
    text: EvaluationText
    vllm: tuple[Vllm, ...] = ()
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"base": str(self.base), "quantized": [str(path) for path in self.quantized]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ComparisonJob:
        return cls(
            base=Path(content["base"]),
            quantized=tuple(Path(path) for path in content["quantized"]),
            text=EvaluationText(**content["text"]),
            vllm=tuple(Vllm(**each) for each in content["vllm"]),
            trust_remote_code=content["trust_remote_code"],
        )


@dataclass(frozen=True, kw_only=True)
class TasksJob:
    """Tasks of lm-evaluation-harness for one model.

    Attributes:
        model: the checkpoint's folder.
        tasks: their names.
        data: a folder with tasks in the harness's YAML format, and copies of the data sets' repositories under their
            names (openai/gsm8k, ceval/ceval-exam, cais/mmlu).
        vllm: runs the model.
        limit: documents per task; None takes all.
        fewshot: examples before each question; None for each task's own.
        chat: ask through the chat template.
        trust_remote_code: allow the checkpoint's own modelling code.
    """

    model: Path
    tasks: list[str]
    data: Path
    vllm: Vllm
    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"model": str(self.model), "data": str(self.data)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TasksJob:
        paths = {key: Path(content[key]) for key in ("model", "data")}
        return cls(**{**content, **paths, "vllm": Vllm(**content["vllm"])})


@dataclass(frozen=True)
class SolvedTasks:
    """How well a model solved tasks.

    Attributes:
        tasks: per task its metrics.
        documents: how many there were, per task.
    """

    tasks: dict[str, dict[str, Estimate]]
    documents: dict[str, int]


@dataclass(frozen=True)
class TextUsed:
    """The text of an evaluation: where it is from, SHA-256 of its token ids, and its size."""

    source: str
    sha256: str
    windows: int
    length: int


@dataclass(frozen=True)
class RuntimeUsed:
    """Who ran the quantized model, and in which type."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Maximum:
    """The largest value over all predicted tokens, and the token: its window, and its position in there."""

    value: float
    window: int
    position: int


@dataclass(frozen=True)
class AlongText:
    """Means of so many predicted tokens each, in the text's order."""

    tokens: int
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How far apart two models are. Each `Estimate` has a 95 % confidence interval.

    Attributes:
        kl_divergence, kl_median, kl_p99: of the quantized model from the base, nats per token.
        kl_max: where they differ most; a maximum has no such interval.
        top1_agreement: how often both put the same token first.
        top5_agreement: the share of the base's five likeliest tokens that are among the quantized one's five.
        kl_by_window: the mean KL divergence of each window of the text, in order.
    """

    base_perplexity: Estimate
    quantized_perplexity: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    kl_max: Maximum
    top1_agreement: Estimate
    top5_agreement: Estimate
    kl_by_window: list[float]
    kl_along_text: AlongText


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison of one model with its base found.

    Attributes:
        base, quantized: the checkpoints' folders.
        date: when it began, in UTC: 2026-01-31T12:00:00+00:00.
        versions: of Python and the packages that computed it.
        seconds, peak_memory_bytes: of its process, which may have compared several models.
    """

    base: str
    quantized: str
    text: TextUsed
    runtime: RuntimeUsed
    date: str
    versions: dict[str, str]
    figures: Figures
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As `qtool eval --json` prints it: the figures are among the rest."""
        content = asdict(self)
        figures = content.pop("figures")
        first = ("base", "quantized", "text", "runtime", "date", "versions")
        return {**{key: content.pop(key) for key in first}, **figures, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Comparison:
        figures = Figures(**{key: content[key] for key in Figures.__dataclass_fields__})
        return cls(
            text=TextUsed(**content["text"]),
            runtime=RuntimeUsed(**content["runtime"]),
            figures=replace(
                figures, kl_max=Maximum(**content["kl_max"]), kl_along_text=AlongText(**content["kl_along_text"])
            ),
            **{key: content[key] for key in ("base", "quantized", "date", "versions", "seconds", "peak_memory_bytes")},
        )


def run(job: ComparisonJob, on_event: Callable[[workers.Event], None]) -> list[Comparison]:
    """Compare checkpoints with their base in a process of its own.

    Returns:
        What was found of each quantized model, in their order.

    Raises:
        InputError: a checkpoint that can't be run, some that don't belong together, or too little text.
        QtoolError: a model's hidden states are not finite, or vLLM or the process fails.
    """
    python = job.vllm[0].python if job.vllm else interpreter("native")
    env = job.vllm[0].env if job.vllm else native.environment()
    found = workers.run("qtool.evaluation.worker", job.to_json(), python=python, env=env, on_event=on_event)
    return [Comparison.from_json(content) for content in found["comparisons"]]


def solve(job: TasksJob, on_event: Callable[[workers.Event], None]) -> SolvedTasks:
    """Have a model solve tasks in a process of its own. Raises InputError and QtoolError as `tasks.solve`."""
    vllm = job.vllm
    found = workers.run("qtool.evaluation.tasks", job.to_json(), python=vllm.python, env=vllm.env, on_event=on_event)
    return SolvedTasks(**found)
