"""Which files of a folder hold which tensors: by the index, or by the files' names where there is none."""

from __future__ import annotations

import re
from pathlib import Path

from qtool.checkpoint.header import TensorInfo, read_header
from qtool.errors import InputError
from qtool.files import exists, read_json

_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by its name, in the order in which the bytes lie in the files.

    Raises:
        InputError: no safetensors, some that are missing or damaged, or an index that disagrees with them.
    """
    index = _find_index(folder)
    weight_map = _read_index(index) if index else {}
    shards = sorted(set(weight_map.values())) if index else _find_shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        file = folder / shard
        if index and not exists(file):
            raise InputError(
                f"names {shard}, which is not there",
                where=str(index),
                hint="Download the missing file, or the model again.",
            )
        for info in read_header(file):
            if weight_map.get(info.name, shard) != shard:
                continue  # the index takes this one from another file
            if info.name in tensors:
                raise InputError(
                    f"tensor {info.name!r} is also in {tensors[info.name].file.name}, and no index says which to use",
                    where=str(file),
                )
            tensors[info.name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(
                f"the index says that it holds tensor {name!r}, but it does not",
                where=str(folder / shard),
                hint="Index and files belong to different versions: download the model again.",
            )
    return tensors


def _find_index(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.safetensors.index.json"))
    usual = folder / "model.safetensors.index.json"
    if len(found) > 1 and usual not in found:
        raise InputError(f"several indexes: {', '.join(file.name for file in found)}", where=str(folder))
    return usual if usual in found else (found[0] if found else None)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map", where=str(index))
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard):
            raise InputError(
                f"puts tensor {name!r} into {str(shard)[:80]!r}, which is not a safetensors file in this folder",
                where=str(index),
                hint="Don't use this model unless you trust where it comes from.",
            )
    return weight_map


def _find_shards(folder: Path) -> list[str]:
    """The safetensors files of a folder without an index."""
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1 and not _SHARD.fullmatch(found[0]):
        return found
    if not found:
        raise InputError("no safetensors files in this folder", where=str(folder), hint=_other_weights(folder))
    numbers = [match.groups() for match in map(_SHARD.fullmatch, found) if match]
    totals = {int(total) for _, total in numbers}
    if len(numbers) != len(found) or len(totals) != 1:
        raise InputError(f"several safetensors files and no index: {', '.join(found[:4])}", where=str(folder))
    missing = set(range(1, totals.pop() + 1)) - {int(number) for number, _ in numbers}
    if missing:
        raise InputError(f"shard {min(missing)} of {numbers[0][1]} is missing", where=str(folder), hint="Download it.")
    return found


def _other_weights(folder: Path) -> str:
    for file in sorted(folder.iterdir()):
        if file.suffix == ".gguf":
            return f"Convert {file.name} first: qtool convert {file} --to safetensors --output DIR"
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            return f"{file.name} is a pickle, which can run code when read; get the model's safetensors version."
    return "Give the folder of a whole model; qtool download gets one."
