"""llama.cpp, by its Python binding xllamacpp."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.runtimes.description import DECODING, Limit, Limitation, Quantized, Reads, Runtime
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes.launch import Launch


def file_of(checkpoint: Checkpoint) -> Path:
    """The file that llama.cpp reads lies in qtool's cache, made once for each content of a checkpoint."""
    from platformdirs import user_cache_path

    from qtool.runtimes.identity import fingerprint

    times = [file.stat().st_mtime_ns for file in sorted(checkpoint.path.glob("*.safetensors"))]
    key = hashlib.sha256(f"{fingerprint(checkpoint.path)} {times}".encode()).hexdigest()[:16]
    return user_cache_path("qtool") / "gguf" / key / f"{checkpoint.path.resolve().name}.gguf"


def _with_file(launch: Launch, checkpoint: Checkpoint) -> Launch:
    return dataclasses.replace(launch, engine={"file": str(file_of(checkpoint))})


def _other_numbers(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme is not None and not _kept(scheme)]
    if not found:
        return None
    return Limitation(
        f"{len(found)} linears are not computed with as the checkpoint has them: llama.cpp knows no float8, and finds "
        "the scales of activations itself, symmetrically"
    )


def _zero_points(model: Quantized) -> Limitation | None:
    found = [name for name, scheme in model.schemes.items() if scheme is not None and not scheme.weights.symmetric]
    if not found:
        return None
    return Limitation(
        f"the weights of {len(found)} linears have zero points, so llama.cpp gets them rounded once more, to 8 bits",
        hint="Quantize the original with --scheme w4a16, whose integers llama.cpp takes as they are.",
    )


def _kept(scheme: Scheme) -> bool:
    inputs = scheme.activations
    return scheme.weights.type == "int" and (inputs is None or (inputs.dynamic and inputs.symmetric))


_LIMITS = (
    Limit(
        "integers with activations that are float or dynamic and symmetric",
        "llama.cpp b11549: ggml/src/ggml-quants.c (quantize_row_q8_0)",
        _other_numbers,
    ),
    Limit(
        "weights without zero points",
        "qtool: blocks with a minimum (Q4_1) are not written",
        _zero_points,
    ),
)

RUNTIME = Runtime(
    name="llama-cpp",
    title="llama.cpp",
    version="2026.10.11549 (xllamacpp)",
    summary="llama.cpp on CPUs; a GGUF file of the model is made first, in qtool's cache",
    reads=(
        Reads("float"),
        Reads("compressed-tensors", limits=_LIMITS),
        Reads("golden-stick", limits=_LIMITS),
        Reads("modelslim", limits=_LIMITS),
    ),
    by_conversion=True,
    hardware=("cpu",),
    worker="qtool.runtimes.worker.llama_cpp",
    sampling=DECODING | {"presence_penalty", "frequency_penalty", "stop"},
    vllm=False,
    adapt=_with_file,
)
