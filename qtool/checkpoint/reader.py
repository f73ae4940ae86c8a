"""A checkpoint folder, read tensor by tensor.

`Checkpoint.open` looks at config.json, the index and every shard's header, and refuses whatever is wrong with
them; after that a tensor is one seek and one read into fresh memory (no mapping: mapped pages would count as
this process's memory for as long as the file is open).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import config as claims
from qtool.checkpoint import dtypes, mindformers, snapshot
from qtool.checkpoint.header import TensorInfo
from qtool.checkpoint.index import find_tensors
from qtool.errors import InputError, QtoolError
from qtool.files import exists, expand, read_json

if TYPE_CHECKING:
    import torch

REPORT = "qtool.json"
LOCK = "qtool.lock.json"


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
        self._described: dict[str, dict[str, Any]] = {}
        self._older = mindformers.is_older(tensors, config)
        if self._older:
            self._tensors = mindformers.renamed(tensors, str(path))

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
        claims.check_kinds(config, str(folder / "config.json"))
        return cls(folder, config, find_tensors(folder))

    def check_claims(self) -> None:
        """Raises InputError when config.json describes a model beyond what the tensors can be of; for who builds it."""
        claims.check_claims(self.config, self._tensors, str(self.path / "config.json"))

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in the order in which the bytes lie in the files; Hugging Face's names for DeepSeek-V3,
        whichever generation of MindFormers' names the files have."""
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

    def row_range(self, name: str, start: int, stop: int, *, pinned: bool = False) -> torch.Tensor:
        """Rows start to stop of a tensor, in the stored dtype. Raises InputError and QtoolError as `tensor`.

        Args:
            pinned: read into memory that CUDA copies from at full speed, and while something else goes on.
        """
        info = self.info(name)
        width = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._read(info, [(info.offset + start * width, (stop - start) * width)], pinned).reshape(
            -1, *info.shape[1:]
        )

    def expect(self, names: Iterable[str]) -> None:
        """Have the system read these tensors into its memory while something else goes on, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            if name not in self:  # it is made of others
                continue
            info = self.info(name)
            with contextlib.suppress(OSError), info.file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def chunks(self, name: str, max_bytes: int) -> Iterator[torch.Tensor]:
        """The numbers of one tensor, flat, in its stored dtype, at most `max_bytes` (a multiple of 8) at a time.

        Raises:
            InputError, QtoolError: as `tensor`.
        """
        info = self.info(name)
        for start in range(0, info.nbytes, max_bytes):
            yield self._read(info, [(info.offset + start, min(max_bytes, info.nbytes - start))])

    def _read(self, info: TensorInfo, spans: list[tuple[int, int]], pinned: bool = False) -> torch.Tensor:
        """The bytes of several (offset, length) spans, one after the other, as a flat tensor of the stored dtype."""
        import torch

        dtype = dtypes.to_torch(info.dtype)
        if dtype is None:
            raise InputError(f"tensor {info.name!r} has dtype {info.dtype}, which can't be read", where=str(info.file))
        data = torch.empty(sum(length for _, length in spans), dtype=torch.uint8, pin_memory=pinned)
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
        """Where this model was downloaded from: hub, repo and commit; None where nobody knows.

        `qtool download` leaves a note of it, and in Hugging Face's cache the path says it.
        """
        if not (self.path / LOCK).is_file():
            found = snapshot.of(self.path)
            return found and {"hub": "huggingface", "repo": found.repo, "commit": found.commit}
        lock = read_json(self.path / LOCK)
        return {key: str(lock.get(key, "")) for key in ("hub", "repo", "commit")}

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder, read once. Raises InputError when it isn't there or holds no object."""
        if file not in self._json:
            self._json[file] = read_json(self.path / file)
        return self._json[file]

    def by_tensor(self, file: str) -> dict[str, Any]:
        """A JSON file whose keys are tensors' names, among others: by the names that they have here.

        Raises InputError as `json`.
        """
        if file not in self._described:
            found = self.json(file)
            self._described[file] = {mindformers.current(k): v for k, v in found.items()} if self._older else found
        return self._described[file]


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
        there = folder.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"can't be read: {getattr(error, 'strerror', error)}", where=str(folder)) from None
    if folder.suffix == ".gguf" and there:
        hint = f"Convert it first: qtool convert {folder} --to safetensors --output DIR"
    elif there:
        hint = "Give the folder that holds config.json, not a file in it."
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        hint = f"If this is a model on a hub, download it first: qtool download {folder}"
    else:
        hint = "Check the path."
    raise InputError("not a folder" if there else "no such folder", where=str(folder), hint=hint)
