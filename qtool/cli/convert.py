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
    from qtool.convert.atomic import output_folder
    from qtool.errors import InputError

    file = Path(path_or_stdin(source)).expanduser()
    if not file.is_file():
        what = "this is a folder, not a GGUF file" if file.is_dir() else "no such file"
        raise InputError(what, where=str(file))
    output = output.expanduser().absolute()
    python = workers.environment("native")
    with console() as out, output_folder(output, overwrite=overwrite) as folder:
        job = {"source": str(file.absolute()), "folder": str(folder), "dtype": dtype}
        result = workers.run("qtool.convert.gguf", job, python=python, on_event=out.event)
    out.info(f"{result['architecture']}, {result['parameters']:,} parameters in {dtype}, {result['nbytes']:,} bytes")
    out.result({"output": str(output), "dtype": dtype, **result} if json else output)
