"""A recipe for one model: sensitivities, a choice, and the choice quantized and evaluated to see that it holds."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from qtool import sizes, workers
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
from qtool.errors import InputError
from qtool.evaluation import job as evaluation
from qtool.evaluation.intervals import Estimate
from qtool.evaluation.job import ComparisonJob, EvaluationText
from qtool.jobs import quantize
from qtool.recipe.schema import Policy, Recipe
from qtool.tuning import job as measuring
from qtool.tuning import search, ways
from qtool.tuning.job import Sensitivities, SensitivityJob
from qtool.tuning.search import FLOAT, Choice, Option, Point, Unit

SCHEME = "tuned"
_CAUTION = 0.97  # of the KL divergence asked for, once a prediction has been too low
_PROBE_WINDOWS, _PROBE_LENGTH, _PROBE_SAMPLES = 4, 256, 16  # at most, for the sensitivities

OnEvent = Callable[[workers.Event], None]


@dataclass(frozen=True)
class Goal:
    """At most so much KL divergence, or at most so many bytes; exactly one of them.

    Attributes:
        max_kl: nats per token.
        max_size: "165MB", "1.2GB", a number of bytes, or "102%" of what the scheme makes without tuning; less than
            100 % needs precisions that are smaller than the scheme's.
    """

    max_kl: float | None = None
    max_size: str | None = None

    def bytes(self, default: int) -> int:
        """max_size, where `default` bytes are 100 %.

        Raises:
            InputError: it is none of these.
        """
        text = self.max_size or ""
        share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text, re.ASCII)
        nbytes = round(float(share[1]) * default / 100) if share else sizes.parse(text)
        if nbytes is None:
            raise InputError(f"{text!r} is not a size", where="--max-size", hint="such as 165MB, 1.2GB or 102%")
        return nbytes


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """What to tune, and on what.

    Attributes:
        recipe, scheme: where to start from.
        precisions: to choose from, presets by their names; none: what the scheme uses, activations static or dynamic.
        extends: the recipe as the new one names it: a shipped recipe's name, or a file's whole path.
        format: of the quantized model.
        text: to evaluate on; the sensitivities are measured on some of it.
        budget: how many times to quantize and evaluate, the scheme as it is among them.
        scratch: where the quantized models lie meanwhile; None: the system's folder for temporary files.
        trust_remote_code: allow the checkpoint's own modelling code.
    """

    model: Path
    recipe: Recipe
    scheme: str
    extends: str
    format: str
    goal: Goal
    precisions: tuple[str, ...] = ()
    text: EvaluationText
    calibration: CalibrationText
    budget: int = 3
    scratch: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Quality:
    """How near a quantized model is to the float one, measured (see `evaluate.job.Figures`)."""

    kl_divergence: Estimate
    top1_agreement: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True)
class Evaluated:
    """A recipe's scheme, quantized and evaluated.

    Attributes:
        predicted_kl: what the sensitivities made of it.
        bytes: of the checkpoint's tensors.
    """

    quality: Quality
    predicted_kl: float
    bytes: int

    @property
    def kl(self) -> float:
        return self.quality.kl_divergence["value"]

    @property
    def surprise(self) -> float:
        """How many times the divergence is what was predicted."""
        return self.kl / max(self.predicted_kl, 1e-12)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.quality), "predicted_kl": self.predicted_kl, "bytes": self.bytes}


@dataclass(frozen=True)
class Change:
    """A group of linears that isn't as in the scheme: a way or float before and after; KL as estimated."""

    linears: list[str]
    before: str
    after: str
    kl: float

    def to_json(self) -> dict[str, Any]:
        return {"linears": self.linears, "from": self.before, "to": self.after, "kl": self.kl}


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        recipe: YAML; the best one measured.
        reached: it meets the goal by measurement.
        reference, tuned: the scheme as it was, and the best one.
        evaluations: how many there were.
        ways: how each group of linears that share their input is quantized in the best recipe.
        frontier: the least KL divergence that is estimated, by bytes of the checkpoint's tensors, ascending.
    """

    recipe: str
    reached: bool
    reference: Evaluated
    tuned: Evaluated
    evaluations: int
    changed: list[Change]
    ways: list[str]
    frontier: list[Point]
    sensitivity: Sensitivities

    def to_json(self) -> dict[str, Any]:
        """As `qtool tune --json` prints it."""
        return {
            "recipe": self.recipe,
            "reached": self.reached,
            "reference": self.reference.to_json(),
            "tuned": self.tuned.to_json(),
            "evaluations": self.evaluations,
            "changed": [change.to_json() for change in self.changed],
            "frontier": [{"bytes": point.bytes, "predicted_kl": point.kl} for point in self.frontier],
            "sensitivity": self.sensitivity.to_json(),
        }


@dataclass(frozen=True)
class Proposed:
    """A recipe that nobody has checked.

    Attributes:
        recipe: YAML.
        predicted_kl: what the sensitivities make of it.
        bytes: of the checkpoint's tensors.
    """

    recipe: str
    predicted_kl: float
    bytes: int


def propose(job: TuningJob, found: Sensitivities) -> Proposed:
    """The recipe that should meet the goal, from sensitivities that were measured for this model and its precisions.

    Raises:
        InputError: a size that is none or can't be reached.
    """
    space = _Space(job, found, _modes(job))
    space.check_size()
    chosen = space.choose(1.0)
    return Proposed(space.recipe(chosen), search.total_kl(chosen), space.bytes(chosen))


def _modes(job: TuningJob) -> list[str]:
    expresses, policies = formats.get(job.format).expresses, job.recipe.schemes[job.scheme]
    return sorted({policy.settled(expresses).activations.mode for policy in policies if policy.quantize})


def tune(job: TuningJob, on_event: OnEvent) -> Tuned:
    """Find a recipe and check it.

    Raises:
        InputError: a size that is none or can't be reached, a budget that is too small, a model that can't be run.
        QtoolError: a worker failed.
    """
    if job.goal.max_size is not None:
        _refuse_impossible(job)
    modes = _modes(job)
    found = sensitivities(job, [] if job.precisions else modes, on_event)
    space = _Space(job, found, modes)
    space.check_size()
    quality = _evaluated(job, job.recipe, job.scheme, on_event)
    reference = Evaluated(quality, search.total_kl(space.default), found.total_bytes)
    tried = _tried(job, space, reference, on_event)
    best = min(tried, key=lambda each: each.evaluated.kl)
    return Tuned(
        recipe=best.text,
        reached=best.reaches(job.goal),
        reference=reference,
        tuned=best.evaluated,
        evaluations=1 + len(tried),
        changed=space.changes(best.chosen),
        ways=[option.way for option in best.chosen.values()],
        frontier=space.frontier(),
        sensitivity=found,
    )


def _refuse_impossible(job: TuningJob) -> None:
    """Before anything is measured: a size that is none, or fewer bytes than the tensors have in any recipe of these.

    Without other precisions, tuning makes linears float or their activations dynamic, so nothing is below the scheme
    as it is, which is 100 %. Exact bytes are known once the linears are (`_Space.check_size`).
    """
    if job.precisions:
        job.goal.bytes(1)
        return
    checkpoint, least = Checkpoint.open(job.model), 0
    for info in map(checkpoint.info, checkpoint.names):
        name = info.name.removesuffix(".weight")
        policy = job.recipe.policy(job.scheme, name) if len(info.shape) == 2 and name != info.name else None
        least += info.nbytes if policy is None else min(info.nbytes, policy.scheme.weights.nbytes(info.shape))
    most = job.goal.bytes(least)
    if most < least:
        _refuse(job.goal, least, most)


def _refuse(goal: Goal, least: int, most: int) -> NoReturn:
    share = str(goal.max_size).strip()
    asked = f"{share} of that" if share.endswith("%") else sizes.show(most)
    raise InputError(
        f"these precisions make at least {sizes.show(least)}, and the limit is {asked}",
        where="--max-size",
        hint="Allow more; or, with --runtime, take all precisions that a runtime reads.",
    )


def sensitivities(job: TuningJob, modes: Sequence[str], on_event: OnEvent) -> Sensitivities:
    """What each linear costs, with these kinds of activations, or in the job's precisions."""
    text, calibration = job.text, job.calibration
    return measuring.run(
        SensitivityJob(
            model=job.model,
            recipe=job.recipe,
            scheme=job.scheme,
            format=job.format,
            modes=tuple(modes),
            precisions=job.precisions,
            text=EvaluationText(text.data, _PROBE_WINDOWS, min(_PROBE_LENGTH, text.length)),
            calibration=replace(calibration, samples=min(_PROBE_SAMPLES, calibration.samples)),
            trust_remote_code=job.trust_remote_code,
        ),
        on_event,
    )


# ------------------------------------------------------------------ what there is to choose from


class _Space:
    """The ways to store each unit, and what they cost.

    Attributes:
        default: what the scheme chooses.
    """

    def __init__(self, job: TuningJob, found: Sensitivities, modes: Sequence[str]) -> None:
        self._job, self._total = job, found.total_bytes
        expresses = formats.get(job.format).expresses
        policies = {
            name: policy and policy.settled(expresses)
            for name in found.bytes
            for policy in [job.recipe.policy(job.scheme, name)]
        }
        self._policies, self._ways = policies, ways.of_modes(policies, modes)
        if job.precisions:
            self._ways = ways.of_precisions(policies, job.precisions, found.group_size)
        self._units = _units(found)
        self.default: Choice = {unit: self._as_in_scheme(unit) for unit in self._units}
        movable = {name for unit in self._units for name in unit.linears}
        self._fixed = found.total_bytes  # what is the same whatever is chosen
        for name, size in found.bytes.items():
            self._fixed -= size.quantized if policies[name] else size.float
            if name not in movable:
                self._fixed += size.float

    def check_size(self) -> None:
        """Raises InputError for a goal of fewer bytes than there can be."""
        if self._job.goal.max_size is None:
            return
        least = self._fixed + sum(unit.smallest.bytes for unit in self._units)
        most = self._job.goal.bytes(self._total)
        if most < least:
            _refuse(self._job.goal, least, most)

    def choose(self, surprise: float) -> Choice:
        """What should meet the goal when divergences are so many times what is estimated."""
        goal = self._job.goal
        if goal.max_kl is not None:
            return search.within_kl(self._units, goal.max_kl / surprise)
        return search.within_bytes(self._units, goal.bytes(self._total) - self._fixed)

    def bytes(self, chosen: Choice) -> int:
        """Of the checkpoint's tensors."""
        return self._fixed + search.total_bytes(chosen)

    def frontier(self) -> list[Point]:
        """Of whole checkpoints."""
        return [Point(self._fixed + point.bytes, point.kl) for point in search.frontier(self._units)]

    def recipe(self, chosen: Choice) -> str:
        """The YAML that says it."""
        return _recipe_text(self._job, chosen, self._ways)

    def changes(self, chosen: Choice) -> list[Change]:
        """Of the scheme."""
        return [
            Change(list(unit.linears), self.default[unit].way, option.way, option.kl)
            for unit, option in chosen.items()
            if option.way != self.default[unit].way
        ]

    def _as_in_scheme(self, unit: Unit) -> Option:
        policy = self._policies[unit.linears[0]]
        assert policy is not None
        way = policy.activations.mode if not self._job.precisions else ways.way_of(unit.linears[0], policy, self._ways)
        return next(option for option in unit.options if option.way == way)


def _units(found: Sensitivities) -> list[Unit]:
    options: dict[tuple[str, ...], list[Option]] = {}
    for group in found.measured.groups:
        linears = tuple(group.linears)
        options.setdefault(linears, []).append(Option(group.way, group.kl, group.bytes))
    return [
        Unit(linears, (*quantized, Option(FLOAT, 0.0, sum(found.bytes[name].float for name in linears))))
        for linears, quantized in options.items()
    ]


# ------------------------------------------------------------------ choosing, and seeing that it holds


@dataclass(frozen=True)
class _Tried:
    """A choice, the recipe that says it, and what was measured with it."""

    chosen: Choice
    text: str
    evaluated: Evaluated

    def reaches(self, goal: Goal) -> bool:
        return goal.max_kl is None or self.evaluated.kl <= goal.max_kl


def _tried(job: TuningJob, space: _Space, reference: Evaluated, on_event: OnEvent) -> list[_Tried]:
    """One choice after the other, until one meets the goal or the budget is spent; at least one."""
    surprise = reference.surprise
    tried: list[_Tried] = []
    while not (tried and tried[-1].reaches(job.goal)) and 1 + len(tried) < job.budget:
        chosen = space.choose(surprise)
        if all(option.way == FLOAT for option in chosen.values()):
            if tried:
                break
            raise InputError(
                "no recipe reaches this KL divergence: every linear would have to stay float",
                where="--max-kl",
                hint=f"the untuned scheme has {reference.kl:.5f}",
            )
        text = space.recipe(chosen)
        quality = _evaluated(job, _parsed(text), SCHEME, on_event)
        evaluated = Evaluated(quality, search.total_kl(chosen), space.bytes(chosen))
        tried.append(_Tried(chosen, text, evaluated))
        surprise = evaluated.surprise / _CAUTION
    return tried


def _recipe_text(job: TuningJob, chosen: Choice, policies: Mapping[str, Mapping[str, Policy | None]]) -> str:
    rest = [policy.model_dump(mode="json", exclude_unset=True) for policy in job.recipe.schemes[job.scheme]]
    export = {} if job.format == job.recipe.export.format else {"export": {"format": job.format}}
    data = {
        "extends": job.extends,
        "name": job.recipe.name if job.recipe.name.endswith(f"-{SCHEME}") else f"{job.recipe.name}-{SCHEME}",
        "description": f"{job.recipe.name}, scheme {job.scheme}, tuned for {job.model.name}",
        "default_scheme": SCHEME,
        **export,
        "schemes": {SCHEME: [*search.policies(chosen, policies), *rest]},
        "calibration": {key: getattr(job.calibration, key) for key in ("data", "samples", "seq_len", "seed")},
    }
    return yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)


def _parsed(text: str) -> Recipe:
    """The recipe as `qtool quantize --recipe FILE` will read it."""
    from qtool.recipe.load import load

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load(file.name)


def _evaluated(job: TuningJob, recipe: Recipe, scheme: str, on_event: OnEvent) -> Quality:
    """Quantize, evaluate, and forget the quantized model."""
    with tempfile.TemporaryDirectory(prefix="qtool-tune-", dir=job.scratch) as folder:
        output = Path(folder) / "model"
        wanted = QuantizationJob(
            model=job.model,
            output=OutputFolder(output, job.format),
            recipe=recipe,
            scheme=scheme,
            calibration=job.calibration,
            trust_remote_code=job.trust_remote_code,
        )
        quantize.run("native", wanted, on_event)
        pair = ComparisonJob(
            base=job.model, quantized=(output,), text=job.text, trust_remote_code=job.trust_remote_code
        )
        (found,) = evaluation.run(pair, on_event)
        figures = found.figures
    return Quality(figures.kl_divergence, figures.top1_agreement, figures.perplexity_ratio)
