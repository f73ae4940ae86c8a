"""`qtool quantize`: a float checkpoint to W8A8."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtool.cli.options import Debug, Json, Quiet, console, path_or_stdin
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.recipe.schema import Recipe


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder; - reads its path from stdin.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make. Default: MODEL-SCHEME, beside MODEL.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or file. Default: the one that matches the model.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="One of the recipe's schemes. Default: the recipe's own.")] = None,
    format: Annotated[
        Literal["compressed-tensors", "golden-stick", "modelslim"] | None, typer.Option(help="Checkpoint format.")
    ] = None,
    engine: Annotated[Literal["auto", "native", "golden-stick"], typer.Option(help="Who quantizes.")] = "auto",
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|builtin|self", help="Text: .txt, .jsonl, .parquet, built-in or its own.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=2, help="Tokens per sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="For everything random.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "npu"], typer.Option(help="Where to compute.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model to W8A8 and print the path of the new checkpoint.

    Examples:

      qtool quantize ./SmolLM2-135M-Instruct --output ./SmolLM2-W8A8

      qtool quantize ./Qwen3-8B --scheme w8a8-dynamic --calibration texts.jsonl --samples 128

      qtool quantize ./Llama-3.1-8B --format golden-stick --dry-run
    """
    from qtool import workers
    from qtool.checkpoint.reader import Checkpoint
    from qtool.checkpoint.storage import check_output, tidy
    from qtool.engines import native
    from qtool.environments.lookup import interpreter
    from qtool.recipe.load import load, match

    folder = Path(path_or_stdin(model)).expanduser().absolute()
    checkpoint = Checkpoint.open(folder)
    if recipe is None:
        chosen, reason = match(checkpoint.config)
    else:
        chosen, reason = load(recipe), "as asked for"
    scheme = scheme or chosen.default_scheme
    if scheme not in chosen.schemes:
        raise InputError(
            f"no scheme {scheme!r} in this recipe",
            where=f"recipe {chosen.name}",
            hint=f"it has {', '.join(chosen.schemes)}",
        )
    target = (output or folder.with_name(f"{folder.name}-{scheme}")).expanduser().absolute()
    if engine == "golden-stick":
        interpreter("golden-stick")
        raise InputError("the golden-stick engine does not run yet", where="--engine", hint="use --engine native")
    if not dry_run:
        check_output(target, overwrite=overwrite, source=folder)
    wanted: dict[str, Any] = {
        "data": calibration or chosen.calibration.data,
        "samples": samples or chosen.calibration.samples,
        "seq_len": seq_len or chosen.calibration.seq_len,
        "seed": chosen.calibration.seed if seed is None else seed,
    }
    with console() as out:
        out.info(f"recipe {chosen.name} ({reason}), scheme {scheme}, engine native")
        if wanted["data"] == "self" and not dry_run:
            wanted = _own_samples(folder, wanted, trust_remote_code, out)
        elif wanted["data"] not in ("builtin", "self"):
            wanted["data"] = str(Path(wanted["data"]).expanduser().absolute())
        job = {
            "model": str(folder),
            "output": str(target),
            "format": format or chosen.export.format,
            "recipe": chosen.model_dump(mode="json"),
            "scheme": scheme,
            "calibration": wanted,
            "device": device,
            "overwrite": overwrite,
            "trust_remote_code": trust_remote_code,
            "dry_run": dry_run,
        }
        python = interpreter("native")
        try:
            result = workers.run(
                "qtool.engines.native.worker", job, python=python, on_event=out.event, env=native.environment()
            )
        finally:
            if not dry_run:
                tidy(target)  # what a killed worker could not remove
    if dry_run:
        _show_plan(result, chosen, out, json)
        return
    out.info(
        f"{len(result['layers'])} layer groups in {result['seconds']:.0f} s, "
        f"{result['input_bytes'] / 1e6:,.0f} MB to {result['output_bytes'] / 1e6:,.0f} MB, "
        f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    out.result(result if json else Path(result["output"]))


def _own_samples(folder: Path, wanted: dict[str, Any], trust_remote_code: bool, out: Console) -> dict[str, Any]:
    """Calibration on what the model writes by itself, at temperature 1."""
    from qtool.runtime import sample

    ids = sample(
        folder,
        wanted["samples"],
        wanted["seq_len"],
        wanted["seed"],
        trust_remote_code=trust_remote_code,
        on_event=out.event,
    )
    digest = hashlib.sha256()
    for row in ids:
        for token in row:
            digest.update(token.to_bytes(8, "little", signed=True))
    return {**wanted, "ids": ids, "digest": digest.hexdigest(), "source": "self (the model's own samples)"}


def _show_plan(result: dict[str, Any], recipe: Recipe, out: Console, json: bool) -> None:
    if json:
        out.result(result)
        return
    rows = [[row["layers"], row["count"], row["policy"]] for row in result["layers"]]
    out.table(f"Plan: recipe {recipe.name}", ["layers", "count", "scheme"], rows)
    calibration = result["calibration"]
    out.result(
        f"calibration: {calibration['data']}, {calibration['samples']} x {calibration['seq_len']} tokens\n"
        f"output: {result['output_bytes'] / 1e6:,.0f} MB of {result['input_bytes'] / 1e6:,.0f} MB\n"
        f"estimated: {result['estimated_seconds']:.0f} s, peak memory {result['estimated_peak_bytes'] / 1e9:.2f} GB"
    )
