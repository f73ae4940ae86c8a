"""What a conversion is asked to do, as it goes to the worker's process."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.scheme import PRESETS

SCHEMES = tuple(name.lower() for name, scheme in PRESETS.items() if scheme.weights.type == "float")
"""What a quantized model can be rounded to without calibration: float8 fits any range, and finds scales at run time."""


@dataclass(frozen=True)
class FormatJob:
    """A quantized checkpoint to another format; `dataclasses.asdict` makes of it what JSON can say.

    Attributes:
        source: the checkpoint's folder.
        output: the folder to make.
        to: one of `formats.TARGETS`.
        overwrite: replace the output if it exists.
        scheme: the name of one of `SCHEMES`, which all quantized layers are rounded to anew; None keeps their numbers.
    """

    source: str
    output: str
    to: str
    overwrite: bool = False
    scheme: str | None = None


@dataclass(frozen=True)
class GgufJob:
    """A GGUF file to a Hugging Face checkpoint.

    Attributes:
        source: the file.
        folder: exists, is empty, and will hold the checkpoint.
        output: what the folder will be called: errors name that.
        dtype: of the parameters: bfloat16, float16 or float32.
    """

    source: str
    folder: str
    output: str
    dtype: str
