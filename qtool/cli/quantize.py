"""`qtool quantize`: a float checkpoint to W8A8."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool.checkpoint import formats
from qtool.cli.bundle import expanded
from qtool.cli.options import Printed, TrustRemoteCode, console, path_or_stdin, size

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.engines.job import Resources
    from qtool.engines.report import DryRun
    from qtool.jobs.quantize import Decided
    from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class Method:
    """How to quantize."""

    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or file. Default: the one that matches the model.")
    ] = None
    scheme: Annotated[str | None, typer.Option(help="One of the recipe's schemes. Default: the recipe's own.")] = None
    format: Annotated[formats.Name | None, typer.Option(help="Checkpoint format.")] = None
    engine: Annotated[Literal["auto", "native", "golden-stick"], typer.Option(help="Who quantizes.")] = "auto"


@dataclass(frozen=True)
class Calibration:
    """What the model is calibrated on."""

    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|builtin|self", help="Text: .txt, .jsonl, .parquet, built-in or its own.")
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples.")] = None
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per sample.")] = None
    seed: Annotated[int | None, typer.Option(help="For everything random.")] = None


@dataclass(frozen=True)
class Machine:
    """Where to compute, and what that may take."""

    device: Annotated[Literal["auto", "cpu", "cuda", "npu"], typer.Option(help="Where to compute.")] = "auto"
    devices: Annotated[
        int | None, typer.Option(min=1, help="Cards, for golden-stick on Ascend. Default: the recipe's.")
    ] = None
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most that a process may take, e.g. 4GB. Smaller is slower.")
    ] = None
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that quantize while the layers run. 0: all in one.")
    ] = 0
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Quantize on a Ray cluster: its address, auto, or local.")
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process. Default: the cores.")] = None

    def resources(self) -> Resources:
        """In bytes. Raises InputError for what is no size."""
        from qtool.engines.job import Resources

        memory = None if self.memory is None else size(self.memory, "--memory")
        return Resources(memory, self.workers, self.ray, self.threads)


@dataclass(frozen=True)
class Run:
    """What a run may do, and what it only shows."""

    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run of this ended.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False
    trust_remote_code: TrustRemoteCode = False


@expanded
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder; - reads its path from stdin.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make. Default: MODEL-SCHEME, beside MODEL.")
    ] = None,
    method: Method,
    calibration: Calibration,
    machine: Machine,
    run: Run,
    printed: Printed,
) -> None:
    """Quantize a model to W8A8 and print the path of the new checkpoint.

    Examples:

      qtool quantize ./SmolLM2-135M-Instruct --output ./SmolLM2-W8A8

      qtool quantize ./Qwen3-8B --scheme w8a8-dynamic --calibration texts.jsonl --samples 128

      qtool quantize ./Llama-3.1-8B --format golden-stick --dry-run

      qtool quantize ./DeepSeek-R1 --recipe deepseek-r1-osl --memory 8GB --workers 8 --resume
    """
    from qtool.jobs import quantize as jobs

    wanted = jobs.Wanted(
        output=output,
        **vars(method),
        **vars(calibration),
        device=machine.device,
        devices=machine.devices,
        resources=machine.resources(),
        overwrite=run.overwrite,
        resume=run.resume,
        trust_remote_code=run.trust_remote_code,
    )
    folder = Path(path_or_stdin(model))
    with console("starting") as out:
        decided = jobs.decide(folder, wanted)
        out.info(decided.why)
        (_plan if run.dry_run else _quantize)(decided, out)


def _quantize(decided: Decided, out: Console) -> None:
    from qtool.jobs import quantize as jobs

    result = jobs.run(decided.engine, decided.job, out.event)
    out.info(
        f"{len(result.report.layers)} layer groups in {result.seconds:.0f} s, "
        f"{result.input_bytes / 1e6:,.0f} MB to {result.output_bytes / 1e6:,.0f} MB, "
        f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    )
    out.result(result.printed() if out.json else result.output)


def _plan(decided: Decided, out: Console) -> None:
    from qtool.jobs import quantize as jobs

    planned = jobs.dry_run(decided.engine, decided.job, out.event)
    out.result(planned.printed() if out.json else _lines(planned, decided.job.recipe, out))


def _lines(plan: DryRun, recipe: Recipe, out: Console) -> str:
    """The plan in words; its table goes to the console."""
    rows = [[row.layers, row.count, row.policy] for row in plan.layers]
    out.table(f"Plan: recipe {recipe.name}", ["layers", "count", "scheme"], rows)
    calibration = plan.calibration
    lines = [
        f"calibration: {calibration['data']}, {calibration['samples']} x {calibration['seq_len']} tokens",
        f"output: {plan.output_bytes / 1e6:,.0f} MB of {plan.input_bytes / 1e6:,.0f} MB",
    ]
    if (needed := plan.resources) is not None:
        lines.append(
            f"estimated: {needed.estimated_seconds:.0f} s, peak memory {needed.estimated_peak_bytes / 1e9:.2f} GB, "
            f"{needed.scratch_bytes / 1e6:,.0f} MB of disk besides the output while it works"
        )
    if plan.launch is not None:
        lines += ["", plan.launch.yaml, plan.launch.msrun]
    return "\n".join(lines)
