"""`qtool run`: a recipe from the hub to generated text, as stages of one job."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import conversion, engines, runtimes, workers
from qtool.calibration.sources import BUILTIN, SELF, absolute, built_in_files
from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.snapshot import title
from qtool.checkpoint.summary import float_dtype
from qtool.engines.job import CalibrationText, OutputFolder, QuantizationJob
from qtool.errors import InputError
from qtool.evaluation import job as evaluation
from qtool.evaluation.job import ComparisonJob, EvaluationText
from qtool.files import encode_json, expand, is_file, write_json, write_text
from qtool.jobs import contents, download, quantize
from qtool.jobs.stages import Done, Job
from qtool.recipe.schema import Recipe
from qtool.runtimes import sampling
from qtool.runtimes.lines import Line
from qtool.runtimes.results import record

OnEvent = Callable[[workers.Event], None]

EVALUATION, ANSWERS = "eval.json", "answers.jsonl"


@dataclass(frozen=True)
class Settings:
    """What the command line adds to a recipe: who computes and where, and whether the model's own code may run."""

    engine: str = "auto"
    device: str = "auto"
    runtime: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Outcome:
    """Where everything is.

    Attributes:
        model: the float model, or the quantized one where the recipe's model is quantized already.
        checkpoints: the quantized model by format, the recipe's own format first.
        evaluation, answers: files, where the recipe asks for them.
        stages: all of them, in order.
    """

    model: Path
    checkpoints: dict[str, Path]
    evaluation: Path | None
    answers: Path | None
    stages: list[Done]


def run(job: Job, recipe: Recipe, model: Path | None, settings: Settings, on_event: OnEvent) -> Outcome:
    """Do all stages of `recipe` that are not done: download, convert from GGUF, quantize, eval, convert, generate.

    Args:
        model: a folder or a GGUF file; None for the one that the recipe names.

    Raises:
        InputError, QtoolError: as the stages do; what is done stays done.
    """
    return _Run(job, recipe, settings, on_event).all(model)


def check(model: Path) -> None:
    """Raises InputError for a folder that is no model, before anything is made."""
    if _gguf(model) is None:
        Checkpoint.open(model)


def _check_also(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises InputError where a further format can't be right, before hours go into the first."""
    recipe, scheme = quantize.with_scheme(recipe, None)
    linears = [name for name in formats.of(checkpoint).layers(checkpoint) if any(map(str.isdigit, name.split(".")))]
    policies = {name: recipe.policy(scheme, name) for name in linears}
    for target in recipe.export.also:
        if target == formats.DEQUANTIZED:
            continue
        form = formats.target(target)
        settled = {name: policy and policy.settled(form.expresses) for name, policy in policies.items()}
        schemes = {name: None if policy is None else policy.scheme for name, policy in settled.items()}
        refused: list[tuple[str, str | None]] = [(each.text, each.hint) for each in form.problems(schemes)]
        if recipe.kv_cache is not None:
            what = f"keys and values are kept as {recipe.kv_cache}, which is not converted to {target}"
            refused.append((what, "leave out kv_cache, or the further format"))
        refused += [
            (each.text, each.hint)
            for each in runtimes.problems(target, checkpoint.config, schemes, float_dtype(checkpoint, ()))
            if each.refuses
        ]
        for text, hint in refused:
            raise InputError(text, where=f"recipe {recipe.name}, export.also: {target}", hint=hint)


@dataclass(frozen=True)
class _Made:
    """A checkpoint, and the digest of what it holds."""

    path: Path
    digest: str


class _Run:
    def __init__(self, job: Job, recipe: Recipe, settings: Settings, on_event: OnEvent) -> None:
        self.job, self.recipe, self.settings, self.on_event = job, recipe, settings, on_event

    def all(self, given: Path | None) -> Outcome:
        model = self._model(given)
        evaluation = None
        quantized = model
        found = formats.of(Checkpoint.open(model.path))
        if found.is_float:
            _check_also(Checkpoint.open(model.path), self.recipe)
            quantized = self._quantize(model)
            if self.recipe.eval.windows:
                evaluation = self._eval(model, quantized)
        else:
            self.job.say(f"quantize, eval: left out, the model is {found.name} already")
        checkpoints = {formats.of(Checkpoint.open(quantized.path)).name: quantized}
        for target in self.recipe.export.also:
            if target not in checkpoints:
                checkpoints[target] = self._convert(quantized, target)
        answers = self._generate(checkpoints) if self.recipe.generate.prompts else None
        paths = {name: made.path for name, made in checkpoints.items()}
        return Outcome(model.path, paths, evaluation, answers, self.job.done)

    # -------------------------------------------------------------- the model

    def _model(self, given: Path | None) -> _Made:
        """The model as a folder of safetensors, wherever it comes from."""
        if given is None:
            downloaded = self._download()
            file = _gguf(downloaded.path)
            return self._from_gguf(file) if file else downloaded
        path = given.absolute()
        file = _gguf(path)
        return self._from_gguf(file) if file else _Made(path, contents.together(contents.of_model(path, self._hashing)))

    def _download(self) -> _Made:
        model = self.recipe.model
        if model is None:
            raise InputError("this recipe names no model", where=f"recipe {self.recipe.name}", hint="Give one.")
        done = self.job.stage(
            "download",
            model.repo.rpartition("/")[2],
            {"model": model.model_dump()},
            lambda target: download.run(model, target, on_event=self.on_event),
            repair=True,
        )
        return _Made(done.output, done.digest)

    def _from_gguf(self, file: Path) -> _Made:
        found = contents.of_files(file.parent, [file.name], self._hashing)
        # A file is often named like its repository, and so like the folder that it was downloaded to.
        name = file.stem if file.stem != file.parent.name else f"{file.stem}-safetensors"
        done = self.job.stage(
            "convert from GGUF",
            name,
            {"file": found[file.name]},
            lambda target: conversion.from_gguf(file, target, "bfloat16", overwrite=True, on_event=self.on_event),
        )
        return _Made(done.output, done.digest)

    # -------------------------------------------------------------- quantize, eval, convert

    def _quantize(self, model: _Made) -> _Made:
        settings = self.settings
        recipe, scheme = quantize.with_scheme(self.recipe, None)

        def job(target: Path) -> QuantizationJob:
            return QuantizationJob(
                model=model.path,
                # With restart: this folder is the job's own, whatever has changed in or around the recipe.
                output=OutputFolder(target, recipe.export.format, resume=True, restart=True),
                recipe=recipe,
                scheme=scheme,
                calibration=CalibrationText.of(recipe),
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
            )

        engine = engines.choose(job(self.job.folder))[0] if settings.engine == "auto" else settings.engine
        inputs = {
            "model": model.digest,
            "scheme": [policy.model_dump(mode="json") for policy in recipe.schemes[scheme]],
            "calibration": recipe.calibration.model_dump() | {"data": self._text(recipe.calibration.data)},
            "osl": recipe.osl,
            "effort": recipe.effort,
            "format": recipe.export.format,
            "max_shard_gb": recipe.export.max_shard_gb,
            "launch": recipe.launch.model_dump(),
            "engine": engine,
            "device": settings.device,
        }

        def make(target: Path) -> None:
            quantize.run(engine, job(target), self.on_event)

        done = self.job.stage("quantize", f"{title(model.path)}-{scheme}", inputs, make)
        return _Made(done.output, done.digest)

    def _eval(self, model: _Made, quantized: _Made) -> Path:
        wanted = self.recipe.eval
        inputs = {
            "base": model.digest,
            "quantized": quantized.digest,
            **wanted.model_dump(),
            "text": self._text(wanted.text),
        }

        def make(target: Path) -> None:
            text = absolute(wanted.text)
            job = ComparisonJob(
                base=model.path,
                quantized=(quantized.path,),
                text=EvaluationText(text, wanted.windows, wanted.length),
                trust_remote_code=self.settings.trust_remote_code,
            )
            (found,) = evaluation.run(job, self.on_event)
            write_json(target, found.to_json())

        return self.job.stage("eval", EVALUATION, inputs, make).output

    def _convert(self, source: _Made, target: str) -> _Made:
        done = self.job.stage(
            f"convert to {target}",
            f"{title(source.path)}-{target}",
            {"source": source.digest, "to": target},
            lambda output: conversion.to_format(source.path, output, target, overwrite=True, on_event=self.on_event),
        )
        return _Made(done.output, done.digest)

    # -------------------------------------------------------------- generate

    def _generate(self, checkpoints: dict[str, _Made]) -> Path:
        format_, name = _runnable(list(checkpoints), self.settings.runtime)
        model, wanted = checkpoints[format_], self.recipe.generate
        inputs = {"model": model.digest, "runtime": name, **wanted.model_dump()}

        def make(target: Path) -> None:
            # With a seed, as on the command line: the same job gives the same answers.
            words = sampling.merged({"seed": 0}, sampling.of_model(Checkpoint.open(model.path)), wanted.given())
            lines = [Line({"prompt": text}, {"prompt": text}) for text in wanted.prompts]
            answers: list[str] = []

            def collect(item: dict[str, Any]) -> None:
                if "error" in item:
                    raise InputError(item["error"], where=f"prompt {item['index'] + 1} of the recipe")
                answers.append(encode_json(record(lines[item["index"]], item)).decode())

            job = runtimes.GenerationJob(
                model=str(model.path),
                sampling=runtimes.get(name).possible(words),
                runtime=self.settings.runtime,
                trust_remote_code=self.settings.trust_remote_code,
            )
            requests = ({"index": i, **line.request} for i, line in enumerate(lines))
            runtimes.stream(job, requests, collect, self._without_items)
            write_text(target, "".join(answers))

        return self.job.stage("generate", ANSWERS, inputs, make).output

    def _without_items(self, event: workers.Event) -> None:
        if event["event"] != "item":
            self.on_event(event)

    # -------------------------------------------------------------- what counts as content

    def _hashing(self, done: int, total: int) -> None:
        self.job.progress("checking the model", done, total)

    def _text(self, data: str) -> str:
        """What stands for a text among a stage's inputs: the SHA-256 of the files that it is in."""
        if data == SELF:
            return data
        found = []
        for path in built_in_files() if data == BUILTIN else [expand(data)]:
            if not is_file(path):
                raise InputError("no such file", where=data)
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        return "-".join(found)


def _gguf(model: Path) -> Path | None:
    """The GGUF file that a model is, or that is all a folder holds of one."""
    if not model.is_dir():
        return model
    found = sorted(model.glob("*.gguf"))
    if (model / "config.json").exists() or not found:
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise InputError(f"several GGUF files: {names}", where=str(model), hint="Give one of them after the recipe.")
    return found[0]


def _runnable(formats: list[str], wanted: str) -> tuple[str, str]:
    """The first format that this machine has a runtime for, and the runtime's name. Raises InputError."""
    reasons = []
    for format_ in formats:
        try:
            return format_, runtimes.choose(wanted, "float" if format_ == "bfloat16" else format_).name
        except InputError as error:
            reasons.append(error)
    raise reasons[0]
