"""Worker: a GGUF file to a Hugging Face checkpoint, through transformers' GGUF loading.

Every tensor is dequantized and rounded to the wanted type as it is read, so the peak is about the size
of the result plus that of the file, not of a float32 copy.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.conversion.job import GgufJob
from qtool.errors import InputError, QtoolError, foreign, in_one_line
from qtool.files import check_free_space, disk_errors
from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report

CARRIED = ("license", "licence", "notice", "copying", "readme")


def main(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Do a `GgufJob`.

    Returns:
        architecture, parameters (how many), nbytes (of the weights).

    Raises:
        InputError: not a GGUF file, damaged, or of an architecture transformers doesn't convert.
        QtoolError: the disk is full.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    hide_media_packages()
    wanted = GgufJob(**job)
    source, folder, output = Path(wanted.source), Path(wanted.folder), Path(wanted.output)
    _check(source)
    check_free_space(output, _weight_bytes(source, wanted.dtype))
    report.progress("loading", 0, 1, "file")
    model, tokenizer = _load(source, wanted.dtype)
    report.progress("loading", 1, 1, "file")
    _forget_gguf(model)
    report.progress("writing", 0, 1, "file")
    with disk_errors(output, model.num_parameters() * model.dtype.itemsize):
        _save(model, tokenizer, folder)
        _carry(source.parent, folder)
    for file in folder.glob("*.safetensors"):  # written as private files
        file.chmod((folder / "config.json").stat().st_mode)
    report.progress("writing", 1, 1, "file")
    _verify(source, folder)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nbytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def _check(source: Path) -> None:
    """Read the header of every tensor, so that a damaged file is found before anything is loaded."""
    where = str(source)
    try:
        import gguf
    except ImportError:
        raise InputError("reading GGUF needs the Python package gguf", hint="pip install 'qtool[native]'") from None
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"can't read the file: {error.strerror}", where=where) from None
    if magic != b"GGUF":
        raise InputError(f"not a GGUF file: it begins with {magic!r}", where=where)
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # the reader checks little: damage shows as whatever numpy raises
        what = in_one_line(error)
        raise InputError(f"damaged or truncated GGUF file: {what}", where=where, hint="download it again") from None
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        hint = "merge the parts first: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise InputError("this is one part of a split GGUF file", where=where, hint=hint)
    if not reader.tensors:
        raise InputError("the GGUF file holds no tensors", where=where)
    if "general.architecture" not in reader.fields:
        raise InputError("the GGUF file doesn't say its architecture", where=where)


def _weight_bytes(source: Path, dtype: str) -> int:
    import gguf

    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(source).tensors) * (4 if dtype == "float32" else 2)


def _load(source: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with foreign("transformers can't load this GGUF file", where=str(source)):
        model, info = AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
    # transformers fills what is missing with random numbers
    absent = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if absent:
        more = "" if len(absent) <= 3 else f" and {len(absent) - 3} more"
        raise InputError(f"the GGUF file lacks tensors: {', '.join(absent[:3])}{more}", where=str(source))
    return model, tokenizer


def _forget_gguf(model: Any) -> None:
    """Make it an ordinary model: a checkpoint that says it is GGUF loads nowhere."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config.dtype = model.dtype


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, max_shard_size="4GB")
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # it has the system's error in its text only
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _carry(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.name.lower().startswith(CARRIED) and file.is_file() and not file.is_symlink():
            shutil.copyfile(file, folder / file.name)


def _verify(source: Path, folder: Path) -> None:
    """What was written opens again: its config makes exactly these tensors, and does not call them quantized.

    transformers puts GGUF tensors in place without comparing shapes, whatever config it has read.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        raise QtoolError("the converted config.json still has a quantization_config", where=str(folder))
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                shape, wanted = file.get_slice(name).get_shape(), expected.pop(name, None)
                if wanted is not None and shape != wanted:
                    what = f"its metadata and its tensors disagree: {name} is {shape}, the metadata make it {wanted}"
                    raise InputError(what, where=str(source))
    if expected:
        raise QtoolError(f"transformers did not write {', '.join(sorted(expected)[:3])}", where=str(folder))
