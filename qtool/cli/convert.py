"""`qtool convert`: a GGUF file to a checkpoint that can be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qtool.cli.options import Debug, Json, Quiet, console, path_or_stdin


def convert(
    source: Annotated[str, typer.Argument(metavar="MODEL.gguf", help="A GGUF file; - reads its path from stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    to: Annotated[Literal["safetensors"], typer.Option(help="The format to convert to.")] = "safetensors",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="The type of the parameters.")
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a GGUF file to a Hugging Face checkpoint (config, tokenizer, safetensors) and print its path.

    The weights are dequantized: what the GGUF's own quantization lost stays lost.
    """
    from qtool import workers
    from qtool.checkpoint.storage import PartialFolder, check_output, disk_errors
    from qtool.environments.lookup import interpreter
    from qtool.errors import InputError

    file = Path(path_or_stdin(source)).expanduser()
    if not file.is_file():
        what = "this is a folder, not a GGUF file" if file.is_dir() else "no such file"
        raise InputError(what, where=str(file))
    output = output.expanduser().absolute()
    check_output(output, overwrite=overwrite, source=file)
    python = interpreter("native")
    partial = PartialFolder(output)
    try:
        job = {"source": str(file.absolute()), "folder": str(partial.path), "output": str(output), "dtype": dtype}
        with console() as out:
            result = workers.run("qtool.convert.gguf", job, python=python, on_event=out.event)
        with disk_errors(output, result["nbytes"]):
            partial.commit(overwrite=overwrite)
    finally:
        partial.discard()
    out.info(f"{result['architecture']}, {result['parameters']:,} parameters in {dtype}, {result['nbytes']:,} bytes")
    out.result({"output": str(output), "dtype": dtype, **result} if json else output)
