"""Writing a checkpoint: tensor by tensor into shards, and all of it or nothing at the output path."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats import Format, Mode
from qtool.checkpoint.formats.common import fused_name
from qtool.checkpoint.journal import FILE as JOURNAL
from qtool.checkpoint.journal import Journal
from qtool.checkpoint.reader import REPORT, Checkpoint
from qtool.checkpoint.shard import Shard
from qtool.checkpoint.storage import PartialFolder, check_output, tidy
from qtool.errors import InputError, QtoolError
from qtool.files import check_free_space, disk_errors, encode_json, sync

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear

_MAX_NAME = 1000
_SCRATCH = "scratch"

__all__ = ["CheckpointWriter", "check_free_space", "check_output"]


class CheckpointWriter:
    """Streams a model to `output`, which comes into being complete, in `finish`, or not at all.

    A context manager: leaving it without `finish` (an error, Ctrl-C) removes everything written, unless there is a
    `key` and something was marked: then a writer with the same key can go on there. An InputError before `finish` still
    removes it, since whoever went on would meet it again. No tensor is kept in memory.

    Attributes:
        records: what `mark` was given in the run that this one resumes.

    Args:
        output: the folder to make.
        format: from `formats.get`.
        overwrite: replace a model folder at `output`, in `finish`.
        max_shard_bytes: upper bound for a file, unless a single tensor is larger.
        expected_tensors: how many tensors will come, roughly; more only means more shards.
        key: what the output is made from; equal only when a job could go on where another one ended.
        resume: go on where a writer of the same key ended.

    Raises:
        InputError: the output exists (without `overwrite`), or is something else than a model folder, or what is to
            be resumed was begun with another key.
    """

    def __init__(
        self,
        output: str | Path,
        format: Format,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = 4 * 10**9,
        expected_tensors: int = 4096,
        key: str | None = None,
        resume: bool = False,
        restart: bool = False,
    ) -> None:
        self.output = Path(output).expanduser().absolute()
        self.format = format
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._expected_tensors = expected_tensors
        self._shards: list[Shard] = []
        self._names: dict[str, int] = {}
        self._linears: dict[str, Mode] = {}
        self._inputs: dict[str, tuple[float | None, int | None]] = {}
        self._new_linears: dict[str, tuple[Mode, float | None, int | None]] = {}
        self._first_open = 1
        self._marked = False
        self._complete = False
        self._journal: Journal | None = None
        self.records: list[dict[str, Any]] = []
        self._obsolete: list[Path] = []
        self._dirty: list[Path] = []
        tidy(self.output, keep_resumable=resume)
        check_output(self.output, overwrite=overwrite)
        entries: list[dict[str, Any]] = []
        self._folder: PartialFolder | None = None
        if key is not None and resume:
            self._folder, entries = PartialFolder.resume(self.output, key, restart=restart) or (None, [])
        if self._folder is None:
            self._folder = PartialFolder(self.output)
        if key is not None:
            with disk_errors(self.output):
                self._restore(entries)
                self._journal = Journal(self._folder.path, key, entries)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._folder is not None:
            for shard in self._shards:
                shard.close()
            if self._journal is not None:
                self._journal.close()
            # The input is at fault: going on would only meet it again. In `finish` it is what lies at the output path.
            damaged = isinstance(error, InputError) and not self._complete
            if self._journal is None or damaged or not self._marked:
                self._folder.discard()
            else:
                self._folder.leave()
                if isinstance(error, InputError):
                    error.hint = "Move that away or pass --overwrite, and --resume: all of the work is kept."
            self._folder = None

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name has been written."""
        return name in self._names

    @property
    def folder(self) -> Path:
        """Where files may lie that must survive as long as the records do; not part of the output."""
        assert self._folder is not None
        scratch = self._folder.path / _SCRATCH
        with disk_errors(self.output):
            scratch.mkdir(exist_ok=True)
        return scratch

    def mark(self, record: dict[str, Any], *, needs: Sequence[Path] = (), obsolete: Sequence[Path] = ()) -> None:
        """All that was written so far is finished work, described by `record`.

        Args:
            needs: files that whoever resumes after this needs.
            obsolete: files that nobody needs who resumes after this; they are removed in due time.

        Raises QtoolError when the disk is full.
        """
        if self._journal is None:
            return
        with disk_errors(self.output):
            self._note(record)
            self._marked = True
            self._dirty += needs
            self._obsolete += obsolete
            if self._journal.due:
                self._sync()

    def _note(self, record: dict[str, Any] | None) -> None:
        """Journal what the shards hold; without a record it is no more than that."""
        assert self._journal is not None
        shards = {str(i): s.state() for i, s in enumerate(self._shards, 1) if i >= self._first_open}
        self._journal.append({"record": record, "shards": shards, "linears": self._new_linears})
        self._new_linears = {}
        self._first_open = next((i for i, s in enumerate(self._shards, 1) if not s.finished), len(self._shards) + 1)

    def _sync(self) -> None:
        assert self._journal is not None
        for shard in self._shards:
            shard.flush()
        for path in self._dirty:
            if path.exists():
                sync(path)
        self._journal.synced()
        for path in self._obsolete:
            path.unlink(missing_ok=True)
        for shard in self._shards:
            if shard.finished:
                shard.remove_tail()
        self._dirty, self._obsolete = [], []

    def _restore(self, entries: list[dict[str, Any]]) -> None:
        assert self._folder is not None
        states: dict[int, list[dict[str, Any]]] = {}
        for entry in entries:
            for number, state in entry["shards"].items():
                states.setdefault(int(number), []).append(state)
                self._names |= dict.fromkeys((part["name"] for _, part in state["entries"]), int(number))
            for name, (mode, scale, offset) in entry["linears"].items():
                self._remember(name, mode, (scale, offset))
        self._new_linears = {}
        for number, of_shard in sorted(states.items()):
            path = self._folder.path / f"shard-{number}"
            named = self._folder.path / self.format.shard_name(number, len(states))
            if named.exists() and not path.exists():  # it ended in `finish`
                named.rename(path)
            self._shards.append(Shard.restore(path, of_shard))
        self._first_open = next((i for i, s in enumerate(self._shards, 1) if not s.finished), len(self._shards) + 1)
        known = {path for shard in self._shards for path in (shard.path, shard.tail_path)}
        for path in self._folder.path.glob("shard-*"):
            if path not in known:
                path.unlink()
        self.records = [entry["record"] for entry in entries if entry["record"] is not None]
        self._marked = bool(entries)

    def _remember(self, name: str, mode: Mode, inputs: tuple[float | None, int | None]) -> None:
        self._linears[name] = mode
        self._new_linears[name] = (mode, *inputs)
        fused = fused_name(name)
        if mode == "float" or not fused:
            return
        if self._inputs.setdefault(fused, inputs) != inputs:
            raise QtoolError(
                f"input scale and offset {inputs} differ from {self._inputs[fused]} of its siblings; "
                "runtimes load one of them for all",
                where=name,
            )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor as it is, under its full name ("model.norm.weight").

        Raises QtoolError when the disk is full or the name is taken.
        """
        if tensor.ndim == 2 and name.endswith(".weight"):
            self._remember(name.removesuffix(".weight"), "float", (None, None))
        self._write(name, tensor)

    def add_linear(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        """Write a quantized layer, by its name without ".weight", into a model of dtype `dtype`.

        Raises QtoolError as `add`, or when runtimes fuse this layer with one that has another input scale.
        """
        mode: Mode = "static" if linear.is_static else "dynamic"
        self._remember(name, mode, (linear.input_scale, linear.input_zero_point))
        for full_name, tensor in self.format.tensors(name, linear, dtype).items():
            self._write(full_name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        if self._folder is None:
            raise QtoolError("the checkpoint is closed", where=str(self.output))
        if name in self._names:
            raise QtoolError(f"tensor {name!r} was written before", where=str(self.output))
        if len(name) > _MAX_NAME:
            raise QtoolError(f"tensor name of {len(name)} characters", where=str(self.output))
        tensor = tensor.detach().cpu().contiguous()
        with disk_errors(self.output, tensor.nbytes):
            last = self._shards[-1] if self._shards else None
            if last is None or last.finished or not last.fits(name, tensor, self._max_shard_bytes):
                if self._shards and not self._shards[-1].finished:
                    self._shards[-1].finish()
                path = self._folder.path / f"shard-{len(self._shards) + 1}"
                self._shards.append(Shard(path, max(16, self._expected_tensors - len(self._names))))
            self._shards[-1].add(name, tensor)
        self._names[name] = len(self._shards)

    def finish(self, source: Checkpoint | None, config: Mapping[str, Any], report: Mapping[str, Any]) -> Path:
        """Complete the checkpoint and put it at the output path.

        Args:
            source: where tokenizer, license and other files come from, if anywhere.
            config: the model's config.json; an old quantization_config in it is replaced.
            report: becomes qtool.json.

        Raises:
            InputError: output and source overlap, or the output has come into being meanwhile; what was marked is kept.
            QtoolError: the disk is full, or no tensor was written.
        """
        if self._folder is None or not self._shards:
            raise QtoolError("no tensors were written", where=str(self.output))
        self._complete = True
        check_output(self.output, overwrite=self._overwrite, source=source.path if source else None)
        folder, count = self._folder.path, len(self._shards)
        with disk_errors(self.output):
            if not self._shards[-1].finished:
                self._shards[-1].finish()
            if self._journal is not None and self._marked:  # before the tails go: an unfinished shard needs its own
                self._note(None)
                self._sync()
            files = [self.format.shard_name(i, count) for i in range(1, count + 1)]
            for shard, file in zip(self._shards, files, strict=True):
                shard.path.rename(folder / file)
            if source is not None:
                _carry_over(source, folder)
            index = self.format.index_name(count)
            if index:
                size = sum(shard.nbytes for shard in self._shards)
                weight_map = {name: files[number - 1] for name, number in self._names.items()}
                _write_json(folder / index, {"metadata": {"total_size": size}, "weight_map": weight_map})
            description = self.format.describe(list(self._names), self._linears, config)
            config = {key: value for key, value in config.items() if key != "quantization_config"}
            if description.quantization_config:
                config["quantization_config"] = description.quantization_config
            _write_json(folder / "config.json", config)
            for name, content in description.files.items():
                _write_json(folder / name, content)
            _write_json(folder / REPORT, report)
            for shard in self._shards:
                shard.remove_tail()
            shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
            self._folder.commit(overwrite=self._overwrite, without=JOURNAL)
        self._folder = None
        return self.output


def _carry_over(source: Checkpoint, folder: Path) -> None:
    for file in source.companions():
        target = folder / file
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path / file, target)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_bytes(encode_json(content, indent=2))
