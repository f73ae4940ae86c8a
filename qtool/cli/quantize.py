"""`qtool quantize`: a float checkpoint to W8A8."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from qtool.checkpoint import formats
from qtool.cli.bundle import expanded
from qtool.cli.choices import RECIPES, RecipeName, SampleLength, Samples, SchemeName
from qtool.cli.options import MODEL, Offline, Printed, TrustRemoteCode, common, console, find_model, resumable, size
from qtool.errors import InputError, QtoolError

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.engines.job import Resources
    from qtool.engines.report import DryRun
    from qtool.jobs.quantize import Decided
    from qtool.jobs.upload import Target
    from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class Method:
    """How to quantize."""

    panel: ClassVar[str] = "Method"

    recipe: RecipeName = None
    scheme: SchemeName = None
    format: Annotated[
        formats.Name | None, typer.Option(help="The format of the checkpoint that is written.", show_default=RECIPES)
    ] = None
    kv_cache: Annotated[
        Literal["fp8", "int8", "float"] | None,
        typer.Option(
            "--kv-cache",
            help="How the runtime keeps keys and values: fp8 in compressed-tensors, int8 in modelslim.",
            show_default=RECIPES,
        ),
    ] = None
    engine: Annotated[Literal["auto", "native", "golden-stick"], typer.Option(help="The engine that quantizes.")] = (
        "auto"
    )
    effort: Annotated[
        Literal["normal", "high"] | None,
        typer.Option(
            help="How thorough to be: high takes several times as long, and the checkpoint is nearer to the original.",
            show_default=RECIPES,
        ),
    ] = None


@dataclass(frozen=True)
class Calibration:
    """What the model is calibrated on."""

    panel: ClassVar[str] = "Calibration"

    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|builtin|self",
            help="The calibration text: a .txt, .jsonl or .parquet file, the built-in text, or the model's own text.",
            show_default=RECIPES,
        ),
    ] = None
    samples: Samples = None
    seq_len: SampleLength = None
    seed: Annotated[int | None, typer.Option(help="The seed for all random choices.", show_default=RECIPES)] = None


@dataclass(frozen=True)
class Machine:
    """Where to compute, and what that may take."""

    panel: ClassVar[str] = "Hardware"

    device: Annotated[Literal["auto", "cpu", "cuda", "npu"], typer.Option(help="The kind of device to compute on.")] = (
        "auto"
    )
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of GPUs or NPUs to quantize on, with a process on each.",
            show_default="1; with the engine golden-stick the recipe's",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="The most memory that each process may use, such as 4GB. Less memory is slower."
        ),
    ] = None
    device_memory: Annotated[
        str | None,
        typer.Option(
            "--device-memory",
            metavar="SIZE",
            help="The most memory of a GPU or NPU to use, such as 20GB.",
            show_default="what is free",
        ),
    ] = None
    workers: Annotated[
        int, typer.Option(min=0, help="The number of extra processes that quantize while the layers run.")
    ] = 0
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Quantize on a Ray cluster: its address, `auto` or `local`.")
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="The number of threads in each process.", show_default="the number of cores"),
    ] = None

    def resources(self) -> Resources:
        """In bytes. Raises InputError for what is not a size."""
        from qtool.engines.job import Resources

        memory = None if self.memory is None else size(self.memory, "--memory")
        on_device = None if self.device_memory is None else size(self.device_memory, "--device-memory")
        return Resources(memory, self.workers, self.ray, self.threads, on_device)


@dataclass(frozen=True)
class Upload:
    """Where the checkpoint goes besides."""

    panel: ClassVar[str] = "Upload"

    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Also upload the checkpoint to this repository. The token and the right to write are checked first. "
            "For modelers.cn, write modelers:ORG/NAME.",
        ),
    ] = None
    private: Annotated[bool, typer.Option("--private", help="If the repository has to be made, make it private.")] = (
        False
    )

    def target(self, *, offline: bool) -> Target | None:
        """Raises InputError for what is not a repository's name, and without the network."""
        from qtool.jobs import upload

        if self.push is None:
            if self.private:
                raise InputError("goes with --push", where="--private", hint="Add --push ORG/NAME, or leave it out.")
            return None
        if offline:
            raise InputError("needs the network", where="--push", hint="Leave out --offline, or upload later.")
        return upload.target(self.push, "--push", private=self.private)


@dataclass(frozen=True)
class Run:
    """What a run may do, and what it only shows."""

    panel: ClassVar[str] = "Run"

    resume: Annotated[bool, typer.Option("--resume", help="Continue an earlier run of the same command.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False
    offline: Offline = False
    trust_remote_code: TrustRemoteCode = False


@expanded
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="The folder to make.",
            show_default="MODEL-SCHEME, beside MODEL",
            rich_help_panel="Method",
        ),
    ] = None,
    method: Method,
    calibration: Calibration,
    machine: Machine,
    upload: Upload,
    run: Run,
    printed: Printed,
) -> None:
    """Quantize a model and print the path of the new checkpoint.

    Examples:

      qtool quantize ./SmolLM2-135M-Instruct --output ./SmolLM2-W8A8

      qtool quantize ./Qwen3-8B --scheme w8a8-dynamic --calibration texts.jsonl --samples 128

      qtool quantize ./Llama-3.1-8B --format golden-stick --dry-run

      qtool quantize ./DeepSeek-R1 --recipe deepseek-r1-osl --memory 8GB --workers 8 --resume

      qtool quantize HuggingFaceTB/SmolLM2-135M-Instruct --push me/SmolLM2-135M-w8a8
    """
    from qtool.jobs import quantize as jobs

    resources = machine.resources()
    target = upload.target(offline=run.offline)
    with console("starting") as out:
        found = find_model(model, out)
        wanted = jobs.Wanted(
            output=output,
            beside=found.beside,
            **vars(method),
            **vars(calibration),
            device=machine.device,
            devices=machine.devices,
            resources=resources,
            overwrite=run.overwrite,
            resume=run.resume,
            trust_remote_code=run.trust_remote_code,
        )
        decided = jobs.decide(found.path, wanted)
        out.info(decided.why, prose=True)
        if decided.advice is not None:
            out.info(decided.advice, prose=True)
        if run.dry_run:
            _plan(decided, out)
        else:
            _quantize(decided, target, out)


def _quantize(decided: Decided, target: Target | None, out: Console) -> None:
    from qtool.jobs import quantize as jobs
    from qtool.jobs import upload

    if target is not None:
        jobs.check(decided.job)  # before there is an empty repository
        upload.claim(target, out.event)
        out.info(f"it will be uploaded to {target.shown}")
    if decided.engine == "native":
        resumable()
    result = jobs.run(decided.engine, decided.job, out.event)
    out.info(
        f"{len(result.report.layers)} layer groups in {result.seconds:.0f} s, "
        f"{result.input_bytes / 1e6:,.0f} MB to {result.output_bytes / 1e6:,.0f} MB, "
        f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    )
    if (chosen := result.report.choice) is not None:
        out.info(chosen, prose=True)
    pushed = None if target is None else _push(Path(result.output), target, out)
    more = {} if pushed is None else {"pushed": pushed}
    out.result(result.printed() | more if out.json else result.output)


def _push(folder: Path, target: Target, out: Console) -> dict[str, Any]:
    """Upload what has been made. A failure says that it is there, and how to go on."""
    from qtool.hub.upload import Given, pack
    from qtool.jobs import upload

    again = f"qtool upload {shlex.quote(str(folder))} {target.repo}"
    again += "" if target.hub == "huggingface" else f" --to {target.hub}"
    common.again = f"The checkpoint is finished. To upload it: {again}"
    try:
        sent = upload.send(pack(folder, target.repo, Given()), target, out.event)
    except QtoolError as error:
        hint = f"{error.hint or ''} The checkpoint is finished. To upload it: {again}".strip()
        raise type(error)(error.what, where=error.where, hint=hint) from None
    out.info(f"uploaded to {sent['url']}: {len(sent['sent'])} files")
    return sent


def _plan(decided: Decided, out: Console) -> None:
    from qtool.jobs import quantize as jobs

    planned = jobs.dry_run(decided.engine, decided.job, out.event)
    output = decided.job.output.path.absolute()
    out.result(
        planned.printed() | {"output": str(output)} if out.json else _lines(planned, decided.job.recipe, output, out)
    )


def _lines(plan: DryRun, recipe: Recipe, output: Path, out: Console) -> str:
    """The plan in words; its table goes to the console."""
    rows = [[row.layers, row.count, row.policy] for row in plan.layers]
    out.table(f"Plan: recipe {recipe.name}", ["layers", "count", "scheme"], rows)
    calibration = plan.calibration
    lines = [
        f"calibration: {calibration['data']}, {calibration['samples']} x {calibration['seq_len']} tokens",
        f"output: {output}",
        f"size: {plan.output_bytes / 1e6:,.0f} MB of {plan.input_bytes / 1e6:,.0f} MB",
    ]
    if (needed := plan.resources) is not None:
        lines.append(
            f"estimated: {needed.estimated_seconds:.0f} s, peak memory {needed.estimated_peak_bytes / 1e9:.2f} GB"
        )
        lines.append(f"disk: {needed.scratch_bytes / 1e6:,.0f} MB besides the output, while it works")
    if plan.launch is not None:
        lines += ["", plan.launch.yaml, plan.launch.msrun]
    return "\n".join(lines)
