"""Worker: a GGUF file to a Hugging Face checkpoint, through transformers' GGUF loading.

Every tensor is dequantized and rounded to the wanted type as it is read, so the peak is about the size
of the result plus that of the file, not of a float32 copy.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.config import MOST_TOKENS
from qtool.conversion.gguf_header import check_lengths
from qtool.conversion.job import GgufJob
from qtool.errors import ForeignError, InputError, QtoolError, foreign
from qtool.files import check_free_space, disk_errors
from qtool.workers import hide_media_packages

if TYPE_CHECKING:
    from qtool.workers import Report

_COUNTS = ("_length", "_count", "_size", "_dim", "_rank", "_count_kv")  # what a tensor is as long as, or longer
_NO_SIDES = ("context_length", "temperature_length", "token_shift_count", "buckets_count")
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
        _save(model, tokenizer, folder, source)
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
    with foreign("damaged or truncated GGUF file", where=where, hint="download it again"):  # it checks little itself
        check_lengths(source)
        reader = gguf.GGUFReader(source)
        split = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
        known = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
        shapes = {str(tensor.name): [int(size) for size in tensor.shape] for tensor in reader.tensors}
    if split != 1:
        hint = "merge the parts first: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise InputError("this is one part of a split GGUF file", where=where, hint=hint)
    if not shapes:
        raise InputError("the GGUF file holds no tensors", where=where)
    _check_claims(known, shapes, where)


def _check_claims(known: Mapping[str, Any], shapes: Mapping[str, list[int]], where: str) -> None:
    """That the metadata are of these tensors: transformers would make a model of what they say, or of its defaults.

    Args:
        known: the metadata that are single values, by name.
        shapes: by tensor.
    """
    architecture = known.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError("the GGUF file doesn't say its architecture", where=where)
    hint = "The file is damaged, or somebody changed its metadata: download it again."
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    said = known.get(f"{architecture}.block_count")
    if said != len(blocks):
        what = f"its metadata speak of {said!r} blocks ({architecture}.block_count), but it holds {len(blocks)}"
        raise InputError(what, where=where, hint=hint)
    width = known.get(f"{architecture}.embedding_length")
    if width not in shapes.get("token_embd.weight", [width]):
        what = f"its metadata make it {width!r} wide ({architecture}.embedding_length), but its embeddings are not"
        raise InputError(what, where=where, hint=hint)
    largest = max(size for shape in shapes.values() for size in [1, *shape])
    tokens = known.get(f"{architecture}.context_length", 0)
    if not isinstance(tokens, int) or not 0 <= tokens <= MOST_TOKENS:
        what = f"{architecture}.context_length is {tokens!r}, but qtool takes no more than {MOST_TOKENS:,}"
        raise InputError(what, where=where, hint=hint)
    for name, value in known.items():
        counts = name.startswith(f"{architecture}.") and name.endswith(_COUNTS) and not name.endswith(_NO_SIDES)
        if counts and (not isinstance(value, int) or not 0 <= value <= largest):
            what = f"{name} is {value!r}, but no tensor has a side longer than {largest:,}"
            raise InputError(what, where=where, hint=hint)


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


def _save(model: Any, tokenizer: Any, folder: Path, source: Path) -> None:
    try:
        with foreign("transformers can't save what it made of this GGUF file", where=str(source)):
            model.save_pretrained(folder, max_shard_size="4GB")
            tokenizer.save_pretrained(folder)
    except ForeignError as error:
        found = re.search(
            r"os error (\d+)", str(error.__cause__)
        )  # safetensors has the system's error in its text only
        if found is not None:
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


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

    with foreign("transformers can't read what it made of this GGUF file", where=str(source)), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        expected = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    if hasattr(config, "quantization_config"):
        raise QtoolError("the converted config.json still has a quantization_config", where=str(folder))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                shape, wanted = file.get_slice(name).get_shape(), expected.pop(name, None)
                if wanted is not None and shape != wanted:
                    what = f"its metadata and its tensors disagree: {name} is {shape}, the metadata make it {wanted}"
                    raise InputError(what, where=str(source))
    if expected:
        raise QtoolError(f"transformers did not write {', '.join(sorted(expected)[:3])}", where=str(folder))
