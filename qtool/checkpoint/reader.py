"""A checkpoint folder, read tensor by tensor.

`Checkpoint.open` looks at config.json, the index and every shard's header, and refuses whatever is wrong with
them; after that a tensor is one seek and one read into fresh memory (no mapping: mapped pages would count as
this process's memory for as long as the file is open).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import dtypes
from qtool.checkpoint.header import TensorInfo, read_header
from qtool.errors import InputError, QtoolError
from qtool.files import exists, expand, is_file

if TYPE_CHECKING:
    import torch

REPORT = "qtool.json"
LOCK = "qtool.lock.json"

_MAX_JSON_BYTES = 500_000_000
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError for anything else."""
    try:
        if not is_file(file):
            raise InputError("no such file", where=str(file))
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise InputError("too large for a JSON file", where=str(file))
        value = json.loads(file.read_bytes().decode())
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(file)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not valid JSON: {error}", where=str(file), hint="Download or copy this file again."
        ) from None
    if not isinstance(value, dict):
        raise InputError("must hold a JSON object", where=str(file))
    return value


class Checkpoint:
    """A model folder: config.json and safetensors. What the tensors mean is the format's to say (`formats.of`).

    Attributes:
        path: the folder.
        config: config.json.
        files: names of all that lay in the folder when it was opened.
        nbytes: size of all tensors in bytes.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.files = frozenset(entry.name for entry in path.iterdir())
        self.nbytes = sum(info.nbytes for info in tensors.values())
        self._tensors = tensors
        self._json: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder, checking everything that headers can tell.

        Raises:
            InputError: no such folder, no or bad config.json, no safetensors, a damaged file, or an index that
                disagrees with its shards. The message names the file; the hint says what to do.
        """
        folder = expand(path)
        _check_folder(folder)
        if not exists(folder / "config.json"):
            raise InputError(
                "no config.json in this folder", where=str(folder), hint="Give the folder of a whole model."
            )
        config = read_json(folder / "config.json")
        return cls(folder, config, _read_tensors(folder))

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in the order in which the bytes lie in the files."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """What a tensor is and where. Raises InputError when there is none of that name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"no tensor {name!r} in this model", where=str(self.path)) from None

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh memory, in its stored shape and dtype.

        Raises:
            InputError: no such tensor, a dtype that torch lacks, or a file that has changed since it was opened.
            QtoolError: the disk or the network fails.
        """
        info = self.info(name)
        return self._read(info, [(info.offset, info.nbytes)]).reshape(info.shape)

    def rows(self, name: str, ids: list[int] | torch.Tensor) -> torch.Tensor:
        """Read only some rows: [len(ids), ...] in the stored dtype; ids may repeat and come in any order.

        Raises:
            InputError: as `tensor`, or an id that is not a row. QtoolError: as `tensor`.
        """
        import torch

        info = self.info(name)
        wanted, inverse = torch.as_tensor(ids, dtype=torch.int64).reshape(-1).unique(return_inverse=True)
        count = info.shape[0] if info.shape else 0
        outside = wanted[(wanted < 0) | (wanted >= count)]
        if len(outside):
            raise InputError(
                f"row {int(outside[0])} asked of {name!r}, which has {count}",
                where=str(info.file),
                hint="Most often the tokenizer belongs to another model: it makes ids that the embedding lacks.",
            )
        width = info.nbytes // count if count else 0
        spans = [(info.offset + first * width, length * width) for first, length in _runs(wanted.tolist())]
        return self._read(info, spans).reshape(len(wanted), *info.shape[1:])[inverse]

    def row_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of a tensor, in the stored dtype. Raises InputError and QtoolError as `tensor`."""
        info = self.info(name)
        width = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._read(info, [(info.offset + start * width, (stop - start) * width)]).reshape(-1, *info.shape[1:])

    def chunks(self, name: str, max_bytes: int) -> Iterator[torch.Tensor]:
        """The numbers of one tensor, flat, in its stored dtype, at most `max_bytes` (a multiple of 8) at a time.

        Raises:
            InputError, QtoolError: as `tensor`.
        """
        info = self.info(name)
        for start in range(0, info.nbytes, max_bytes):
            yield self._read(info, [(info.offset + start, min(max_bytes, info.nbytes - start))])

    def _read(self, info: TensorInfo, spans: list[tuple[int, int]]) -> torch.Tensor:
        """The bytes of several (offset, length) spans, one after the other, as a flat tensor of the stored dtype."""
        import torch

        dtype = dtypes.to_torch(info.dtype)
        if dtype is None:
            raise InputError(f"tensor {info.name!r} has dtype {info.dtype}, which can't be read", where=str(info.file))
        data = torch.empty(sum(length for _, length in spans), dtype=torch.uint8)
        buffer = data.numpy().data
        try:
            with info.file.open("rb", buffering=0) as stream:
                for offset, length in spans:
                    stream.seek(offset)
                    while length:
                        got = stream.readinto(buffer[:length])
                        if not got:
                            raise InputError("has become shorter since it was opened", where=str(info.file))
                        buffer, length = buffer[got:], length - got
        except OSError as error:  # no InputError: when the model was opened its files were there, and well
            raise QtoolError(
                f"can't be read any more: {error.strerror}", where=str(info.file), hint="Check the disk or the network."
            ) from None
        return data != 0 if dtype is torch.bool else data.view(dtype)

    @property
    def origin(self) -> dict[str, str] | None:
        """Where `qtool download` got this model: hub, repo and commit; None for a folder from elsewhere."""
        if not (self.path / LOCK).is_file():
            return None
        lock = read_json(self.path / LOCK)
        return {key: str(lock.get(key, "")) for key in ("hub", "repo", "commit")}

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder, read once. Raises InputError when it isn't there or holds no object."""
        if file not in self._json:
            self._json[file] = read_json(self.path / file)
        return self._json[file]


def _runs(sorted_ids: list[int]) -> Iterable[tuple[int, int]]:
    """Consecutive numbers as (first, how many)."""
    start = 0
    for i in range(1, len(sorted_ids) + 1):
        if i == len(sorted_ids) or sorted_ids[i] != sorted_ids[i - 1] + 1:
            yield sorted_ids[start], i - start
            start = i


def _check_folder(folder: Path) -> None:
    try:
        if folder.is_dir():
            next(folder.iterdir(), None)
            return
        exists = folder.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"can't be read: {getattr(error, 'strerror', error)}", where=str(folder)) from None
    if folder.suffix == ".gguf" and exists:
        hint = f"Convert it first: qtool convert {folder} --to safetensors --output DIR"
    elif exists:
        hint = "Give the folder that holds config.json, not a file in it."
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        hint = f"If this is a model on a hub, download it first: qtool download {folder}"
    else:
        hint = "Check the path."
    raise InputError("not a folder" if exists else "no such folder", where=str(folder), hint=hint)


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
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
                    f"tensor {info.name!r} is also in {tensors[info.name].file.name}, and no index says which counts",
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
