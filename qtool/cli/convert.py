"""`qtool convert`: between W8A8 formats, to float8, to a GGUF file, and from one to what can be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtool.checkpoint import formats
from qtool.cli.options import MODEL, Debug, Json, Offline, Quiet, console, find_model, path_or_stdin
from qtool.conversion.job import SCHEMES
from qtool.errors import InputError
from qtool.files import expand, is_dir, is_file

SAFETENSORS = "safetensors"  # what a GGUF file becomes
GGUF = "gguf"

if TYPE_CHECKING:
    from qtool.console import Console

    Target = str
else:
    Target = Literal[(*formats.TARGETS, GGUF, SAFETENSORS)]


def convert(
    source: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    to: Annotated[
        Target | None,
        typer.Option(
            metavar="NAME",
            help=f"The new format: {', '.join((*formats.TARGETS, GGUF))}, or {SAFETENSORS}, which is for GGUF "
            "files alone.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The folder to make, or the GGUF file.",
            show_default="MODEL-FORMAT, MODEL-SCHEME or MODEL.gguf, beside MODEL",
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Round a quantized model again, to {' or '.join(SCHEMES)}.",
            show_default="the numbers stay",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="The type of the parameters, if MODEL is a GGUF file.", show_default="bfloat16"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a quantized model to another W8A8 format or back to bfloat16, or from and to a GGUF file.

    Between W8A8 formats the integers stay the same. If the new format's runtime holds input scales in the model's
    dtype, they are rounded to it, and the result says by how much at most. bfloat16 gives the values that the integers
    stand for: smoothing stays folded in, and precision that quantization lost does not come back. The same holds for
    the quantization of a GGUF file.

    With --scheme, integers become float8, which GPUs without int8 products (Blackwell) compute with. No calibration is
    needed. That rounds a second time, and the result says by how much the weights change: if you have the float model,
    quantize that instead.

    gptq and awq are for programs that read nothing else. They hold int4 weights beside float activations, as the scheme
    w4a16 makes them, and gptq also int8.

    gguf is for llama.cpp and the programs that use it. Symmetric integers of up to 8 bits stay the same there, too. A
    float model can become a GGUF file as well.

    Examples:

      qtool convert SmolLM2-w8a8-static --to golden-stick

      qtool convert SmolLM2-w8a8 --to bfloat16 --output SmolLM2-dequantized

      qtool convert SmolLM2-w8a8 --scheme fp8-dynamic

      qtool convert SmolLM2-w8a8 --to gguf --output SmolLM2-w8a8.gguf

      qtool convert SmolLM2-135M-Instruct.Q4_1.gguf --output SmolLM2
    """
    from qtool.jobs.models import parse

    given = path_or_stdin(source)
    path = expand(given)
    if is_file(path) or path.suffix == ".gguf":
        if scheme is not None:
            hint = f"Convert it to a folder first, then: qtool quantize DIR --scheme {scheme}"
            raise InputError("is for quantized checkpoints, not for GGUF files", where="--scheme", hint=hint)
        _gguf(path, to, output, dtype or "bfloat16", overwrite=overwrite)
    elif is_dir(path) or parse(given) is not None:
        _checkpoint(given, to, output, dtype, scheme, overwrite=overwrite)
    else:
        raise InputError("no such file or folder", where=str(path))


def _checkpoint(
    given: str, to: str | None, output: Path | None, dtype: str | None, scheme: str | None, *, overwrite: bool
) -> None:
    from qtool import conversion as service
    from qtool.checkpoint.reader import Checkpoint

    if scheme is not None:
        to, scheme = service.for_scheme(to, scheme)
    if to is None or to == SAFETENSORS:
        hint = f"Say which: --to {', '.join((*formats.NAMES, *formats.EXPORTS, GGUF))} or {formats.DEQUANTIZED}."
        raise InputError("a folder can be converted to several formats", where="--to", hint=hint)
    if dtype is not None:
        raise InputError("is only for GGUF files; a folder keeps its dtype", where="--dtype")
    with console("starting") as out:
        found = find_model(given, out)
        source = Checkpoint.open(found.path).path.absolute()  # what is wrong should show before torch is imported
        if to == GGUF:
            _to_gguf(source, expand(output or found.beside.with_name(f"{found.beside.name}.gguf")), out, overwrite)
            return
        target = expand(output or service.beside(found.beside, scheme or to)).absolute()
        result = service.to_format(source, target, to, overwrite=overwrite, on_event=out.event, scheme=scheme)
        layers = ", ".join(f"{count} {scheme}" for scheme, count in result["layers"].items())
        rounding = result["input_scale_rounding"]
        scales = f"input scales rounded by up to {rounding:.2%}" if rounding else "scales unchanged"
        integers = f"{result['integers']:,} integers" + (
            " dequantized" if to == formats.DEQUANTIZED else f" unchanged, {scales}"
        )
        if scheme is not None:
            integers = f"a second rounding changed the weights by {result['weight_rounding']:.2%} (root mean square)"
        out.info(f"{result['from']} to {to}: {layers} layers, {integers}, in {result['seconds']:.1f} s")
        _print(out, result)


def _to_gguf(source: Path, output: Path, out: Console, overwrite: bool) -> None:
    from qtool import conversion as service

    result = service.to_gguf(source, output, overwrite=overwrite, on_event=out.event)
    layers = ", ".join(f"{count} {scheme}" for scheme, count in result["layers"].items())
    rounding = result["scale_rounding"]
    scales = f"scales rounded by up to {rounding:.2%}" if rounding else "scales unchanged"
    what = f"{layers} layers, {result['integers']:,} integers unchanged, {scales}" if layers else "a float model"
    out.info(f"{result['from']} to gguf: {what}, {result['nbytes']:,} bytes, in {result['seconds']:.1f} s")
    _print(out, result)


def _gguf(source: Path, to: str | None, output: Path | None, dtype: str, *, overwrite: bool) -> None:
    from qtool import conversion as service

    if not is_file(source):
        raise InputError("no such file", where=str(source))
    if to not in (None, SAFETENSORS):
        hint = "Convert it to a folder first (--to safetensors), then: qtool quantize DIR"
        raise InputError(f"a file is a GGUF file, and can't become {to} at once", where="--to", hint=hint)
    target = expand(output or service.beside(source, None)).absolute()
    with console("starting") as out:
        result = service.from_gguf(source, target, dtype, overwrite=overwrite, on_event=out.event)
        facts = f"{result['parameters']:,} parameters in {dtype}, {result['nbytes']:,} bytes"
        out.info(f"{result['architecture']}, {facts}")
        _print(out, result)


def _print(out: Console, result: dict[str, object]) -> None:
    out.result(result if out.json else Path(str(result["output"])))
