"""A recipe for one model: sensitivities, a choice, and the choice quantized and evaluated to see that it holds."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qtool import sizes, workers
from qtool.engines import native
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
from qtool.environments.lookup import interpreter
from qtool.errors import InputError
from qtool.jobs import quantize
from qtool.recipe.schema import Policy, Recipe
from qtool.tuning import search
from qtool.tuning.search import FLOAT, Choice, Option, Unit

SCHEME = "tuned"
_CAUTION = 0.97  # of the KL divergence asked for, once a prediction has been too low


@dataclass
class Goal:
    """At most so much KL divergence, or at most so many bytes; exactly one of them.

    Attributes:
        max_kl: nats per token.
        max_size: "165MB", "1.2GB", a number of bytes, or "102%" of what the scheme makes without tuning.
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
            raise InputError(f"{text!r} is no size", where="--max-size", hint="such as 165MB, 1.2GB or 102%")
        return nbytes


@dataclass
class Job:
    """What to tune, and on what.

    Attributes:
        recipe, scheme: where to start from; activations stay of the kinds that this scheme uses.
        extends: the recipe as the new one names it: a shipped recipe's name, or a file's whole path.
        text: for the sensitivities and to evaluate on; builtin or a file.
        windows, length: of the text, to evaluate on.
        probe_windows, probe_length: of the text, for the sensitivities.
        calibration: {"data", "samples", "seq_len", "seed"}.
        probe_samples: calibration samples for the sensitivities.
        budget: how many times to quantize and evaluate, the scheme as it is among them.
        scratch: where the quantized models lie meanwhile; None: the system's folder for temporary files.
    """

    model: Path
    recipe: Recipe
    scheme: str
    extends: str
    format: str
    goal: Goal
    text: str
    calibration: dict[str, Any]
    windows: int = 24
    length: int = 512
    probe_windows: int = 4
    probe_length: int = 256
    probe_samples: int = 16
    budget: int = 3
    scratch: Path | None = None
    trust_remote_code: bool = False
    on_event: Callable[[workers.Event], None] = field(default=lambda event: None)


@dataclass(frozen=True)
class _Tried:
    """A choice, the recipe that says it, and what was measured with it."""

    chosen: Choice
    text: str
    figures: dict[str, Any]

    @property
    def kl(self) -> float:
        return float(self.figures["kl_divergence"]["value"])

    def reaches(self, goal: Goal) -> bool:
        return goal.max_kl is None or self.kl <= goal.max_kl


def tune(job: Job) -> dict[str, Any]:
    """Find a recipe and check it.

    Returns:
        recipe (YAML; the best one measured), reached (whether it meets the goal by measurement), reference and tuned
        ({"kl_divergence", "bytes", "predicted_kl"}), evaluations (how many), changed (one row per group that isn't as
        in the scheme), and sensitivity (see `tuning.worker`).

    Raises:
        InputError: a size that is none or can't be reached, a budget that is too small, a model that can't be run.
        QtoolError: a worker failed.
    """
    if job.goal.max_size is not None:
        job.goal.bytes(1)  # a wrong one shows before anything is measured
    modes: list[str] = sorted({policy.activations.mode for policy in job.recipe.schemes[job.scheme] if policy.quantize})
    found = sensitivities(job, modes)
    policies = {name: job.recipe.policy(job.scheme, name) for name in found["bytes"]}
    ways = {mode: search.with_mode(policies, mode) for mode in modes}
    units = _units(found)
    fixed = found["total_bytes"] - sum(_scheme_bytes(job, name, sizes) for name, sizes in found["bytes"].items())
    fixed += sum(sizes[0] for name, sizes in found["bytes"].items() if not any(name in unit.linears for unit in units))
    default = {unit: _as_in_scheme(job, unit) for unit in units}
    if job.goal.max_size is not None:
        _check_size(job.goal.bytes(found["total_bytes"]), fixed + sum(unit.smallest.bytes for unit in units))
    reference = _evaluated(job, job.recipe, job.scheme)
    reference |= {"predicted_kl": search.total_kl(default), "bytes": found["total_bytes"]}
    ratio, caution = reference["kl_divergence"]["value"] / max(search.total_kl(default), 1e-12), 1.0
    tried: list[_Tried] = []
    while not (tried and tried[-1].reaches(job.goal)) and 1 + len(tried) < job.budget:
        chosen = _choose(job, units, fixed, found["total_bytes"], ratio * caution)
        if all(option.way == FLOAT for option in chosen.values()):
            if tried:
                break
            raise InputError(
                "no recipe has so little KL divergence: every linear would have to stay float",
                where="--max-kl",
                hint=f"the untuned scheme has {reference['kl_divergence']['value']:.5f}",
            )
        text = _recipe_text(job, chosen, ways)
        figures = _evaluated(job, _parsed(text, job), SCHEME)
        figures |= {"predicted_kl": search.total_kl(chosen), "bytes": fixed + search.total_bytes(chosen)}
        tried.append(_Tried(chosen, text, figures))
        ratio, caution = tried[-1].kl / max(search.total_kl(chosen), 1e-12), 1 / _CAUTION
    best = min(tried, key=lambda each: each.kl)
    return {
        "recipe": best.text,
        "reached": best.reaches(job.goal),
        "reference": reference,
        "tuned": best.figures,
        "evaluations": 1 + len(tried),
        "changed": [
            {"linears": list(unit.linears), "from": default[unit].way, "to": option.way, "kl": option.kl}
            for unit, option in best.chosen.items()
            if option.way != default[unit].way
        ],
        "sensitivity": found,
    }


def sensitivities(job: Job, modes: list[str]) -> dict[str, Any]:
    """What `tuning.worker` finds."""
    wanted = {
        "model": str(job.model),
        "recipe": job.recipe.model_dump(mode="json"),
        "scheme": job.scheme,
        "format": job.format,
        "modes": modes,
        "text": job.text,
        "windows": job.probe_windows,
        "length": job.probe_length,
        "calibration": {**job.calibration, "samples": min(job.probe_samples, job.calibration["samples"])},
        "trust_remote_code": job.trust_remote_code,
    }
    env = native.environment()
    return workers.run("qtool.tuning.worker", wanted, python=interpreter("native"), env=env, on_event=job.on_event)


def _units(found: Mapping[str, Any]) -> list[Unit]:
    options: dict[tuple[str, ...], list[Option]] = {}
    for group in found["groups"]:
        linears = tuple(group["linears"])
        size = sum(found["bytes"][name][1] for name in linears)
        options.setdefault(linears, []).append(Option(group["way"], group["kl"], size))
    return [
        Unit(linears, (*ways, Option(FLOAT, 0.0, sum(found["bytes"][name][0] for name in linears))))
        for linears, ways in options.items()
    ]


def _scheme_bytes(job: Job, name: str, sizes: list[int]) -> int:
    return sizes[1] if job.recipe.policy(job.scheme, name) else sizes[0]


def _as_in_scheme(job: Job, unit: Unit) -> Option:
    policy = job.recipe.policy(job.scheme, unit.linears[0])
    assert policy is not None
    return next(option for option in unit.options if option.way == policy.activations.mode)


def _choose(job: Job, units: list[Unit], fixed: int, default: int, ratio: float) -> Choice:
    if job.goal.max_kl is not None:
        return search.within_kl(units, job.goal.max_kl / ratio)
    return search.within_bytes(units, job.goal.bytes(default) - fixed)


def _check_size(most: int, least: int) -> None:
    if most < least:
        raise InputError(
            f"this scheme makes {least:,} bytes at least, and {most:,} are allowed",
            where="--max-size",
            hint="W8A8 can't be smaller: allow more",
        )


def _recipe_text(job: Job, chosen: Choice, ways: dict[str, dict[str, Policy | None]]) -> str:
    rest = [policy.model_dump(mode="json", exclude_unset=True) for policy in job.recipe.schemes[job.scheme]]
    data = {
        "extends": job.extends,
        "name": job.recipe.name if job.recipe.name.endswith(f"-{SCHEME}") else f"{job.recipe.name}-{SCHEME}",
        "description": f"{job.recipe.name}, scheme {job.scheme}, tuned for {job.model.name}",
        "default_scheme": SCHEME,
        "schemes": {SCHEME: [*search.policies(chosen, ways), *rest]},
        "calibration": job.calibration,
    }
    return yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)


def _parsed(text: str, job: Job) -> Recipe:
    """The recipe as `qtool quantize --recipe FILE` will read it."""
    from qtool.recipe.load import load

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load(file.name)


def _evaluated(job: Job, recipe: Recipe, scheme: str) -> dict[str, Any]:
    """Quantize, evaluate, and forget the quantized model."""
    with tempfile.TemporaryDirectory(prefix="qtool-tune-", dir=job.scratch) as folder:
        output = Path(folder) / "model"
        wanted = QuantizationJob(
            model=job.model,
            output=OutputFolder(output, job.format),
            recipe=recipe,
            scheme=scheme,
            calibration=CalibrationText(**job.calibration),
            trust_remote_code=job.trust_remote_code,
        )
        quantize.run("native", wanted, job.on_event)
        compared = {
            "base": str(job.model),
            "quantized": str(output),
            "text": job.text,
            "windows": job.windows,
            "length": job.length,
            "runtime": None,
            "engine": {},
            "trust_remote_code": job.trust_remote_code,
        }
        python = interpreter("native")
        result = workers.run("qtool.evaluate.worker", compared, python=python, on_event=job.on_event)
    return {key: result[key] for key in ("kl_divergence", "top1_agreement", "perplexity_ratio")}
