"""Writing a checkpoint: tensor by tensor into shards, and all of it or nothing at the output path."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.companions import companions
from qtool.checkpoint.formats import CachingFormat, Holding, Writable
from qtool.checkpoint.journal import FILE as JOURNAL
from qtool.checkpoint.linears import Linears
from qtool.checkpoint.marks import Marks
from qtool.checkpoint.reader import REPORT, Checkpoint
from qtool.checkpoint.shards import Sharding, Shards
from qtool.checkpoint.storage import PartialFolder, check_output, tidy
from qtool.errors import InputError, QtoolError
from qtool.files import disk_errors, encode_json, expand

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedCache, QuantizedLinear

_MAX_NAME = 1000
_SCRATCH = "scratch"

__all__ = ["CheckpointWriter", "Resume", "Sharding"]


@dataclass(frozen=True)
class Resume:
    """Lets a writer go on where another one ended.

    Attributes:
        key: what the output is made from; equal only when a job could go on where another one ended.
        wanted: go on now. Without it everything is made anew, and can be resumed later.
        restart: what is left of another key is removed, rather than refused.
    """

    key: str
    wanted: bool = False
    restart: bool = False


class CheckpointWriter:
    """Streams a model to `output`, which comes into being complete, in `finish`, or not at all.

    A context manager: leaving it without `finish` (an error, Ctrl-C) removes everything written, unless it can be
    resumed and something was marked. An InputError before `finish` still removes it, since whoever went on would meet
    it again. No tensor is kept in memory, but those few of `format.together`.

    Args:
        output: the folder to make.
        format: from `formats.get`, or `formats.PLAIN`.
        overwrite: replace a model folder at `output`, in `finish`.
        sharding: sizes of files.
        resume: for work that can be resumed.

    Raises:
        InputError: the output exists (without `overwrite`), or is something else than a model folder, or what is to
            be resumed was begun with another key; another process is writing it.
    """

    def __init__(
        self,
        output: str | Path,
        format: Writable,
        *,
        overwrite: bool = False,
        sharding: Sharding | None = None,
        resume: Resume | None = None,
    ) -> None:
        self.output = expand(output).absolute()
        self.format = format
        self._overwrite = overwrite
        self._complete = False
        # What can be resumed takes long: two at once would do all of it twice.
        if resume is not None:
            PartialFolder.check_alone(self.output)
        tidy(self.output, keep_resumable=resume is not None and resume.wanted)
        check_output(self.output, overwrite=overwrite)
        found = None
        if resume is not None and resume.wanted:
            found = PartialFolder.resume(self.output, resume.key, restart=resume.restart)
        folder, entries = found or (PartialFolder.make(self.output), [])
        if resume is not None:
            try:
                PartialFolder.check_alone(self.output, folder)
            except InputError:
                folder.leave() if found else folder.discard()
                raise
        self._folder: PartialFolder | None = folder
        self._linears = Linears()
        self._shards = Shards(folder.path, sharding or Sharding())
        self._together: tuple[str, ...] = ()
        self._waiting: dict[str, torch.Tensor] = {}
        self._marks: Marks | None = None
        if resume is not None:
            with disk_errors(self.output):
                for entry in entries:
                    self._linears.restore(entry["linears"])
                self._shards.restore((entry["shards"] for entry in entries), format.shard_name)
                self._marks = Marks(folder.path, resume.key, entries, self._shards, self._linears)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._folder is None:
            return
        self._shards.close()
        if self._marks is not None:
            self._marks.close()
        # The input is at fault: going on would only meet it again. In `finish` it is what lies at the output path.
        damaged = isinstance(error, InputError) and not self._complete
        if self._marks is None or damaged or not self._marks.any:
            self._folder.discard()
        else:
            self._folder.leave()
            if isinstance(error, InputError):
                error.hint = "Move that folder or pass --overwrite, and add --resume: the finished work is kept."
        self._folder = None

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name has been written."""
        return name in self._shards.numbers or name in self._waiting

    @property
    def records(self) -> list[dict[str, Any]]:
        """What `mark` was given in the runs that this one resumes."""
        return self._marks.records if self._marks else []

    @property
    def folder(self) -> Path:
        """Where files may lie that must survive as long as the records do; not part of the output."""
        scratch = self._open().path / _SCRATCH
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
        if self._marks is not None:
            with disk_errors(self.output):
                self._marks.mark(record, needs=needs, obsolete=obsolete)

    def expect(self, names: Iterable[str]) -> None:
        """All tensors of these names will come, before the next `mark`: those of `format.together` go into one file."""
        found = set(names).difference(self._shards.numbers)
        together = tuple(name for name in self.format.together if name in found)
        self._together = together if len(together) > 1 else ()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor as it is, under its full name ("model.norm.weight").

        Raises QtoolError when the disk is full or the name is taken.
        """
        if tensor.ndim == 2 and name.endswith(".weight"):
            self._linears.add(name.removesuffix(".weight"), None)
        self._write(name, tensor)

    def add_linear(self, name: str, linear: QuantizedLinear, dtype: torch.dtype, *, transposed: bool = False) -> None:
        """Write a quantized layer, by its name without ".weight", into a model of dtype `dtype`.

        Args:
            transposed: a `weight` lies in the file as [in, out].

        Raises QtoolError as `add`, or when runtimes fuse this layer with one that has another input scale.
        """
        assert isinstance(self.format, Holding)
        self._linears.add(name, linear.scheme, (linear.input_scale, linear.input_zero_point))
        for full_name, tensor in self.format.tensors(name, linear, dtype).items():
            self._write(full_name, tensor.t() if transposed and full_name == f"{name}.weight" else tensor)

    def add_cache(self, name: str, cache: QuantizedCache) -> None:
        """Write how the keys and values of an attention module, by its name, are kept. Raises QtoolError as `add`."""
        assert isinstance(self.format, CachingFormat)
        for full_name, tensor in self.format.cache_tensors(name, cache).items():
            self._write(full_name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self._open()
        if name in self:
            raise QtoolError(f"tensor {name!r} was written before", where=str(self.output))
        if len(name) > _MAX_NAME:
            raise QtoolError(f"tensor name of {len(name)} characters", where=str(self.output))
        tensor = tensor.detach().cpu().contiguous()
        with disk_errors(self.output, tensor.nbytes):
            if name not in self._together:
                self._shards.add({name: tensor})
                return
            self._waiting[name] = tensor
            if len(self._waiting) == len(self._together):
                self._shards.add({name: self._waiting[name] for name in self._together})
                self._waiting = {}

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
        if self._folder is None or not len(self._shards):
            raise QtoolError("no tensors were written", where=str(self.output))
        self._complete = True
        check_output(self.output, overwrite=self._overwrite, source=source.path if source else None)
        with disk_errors(self.output):
            self._shards.finish()
            if self._marks is not None:
                self._marks.finish()
            self._name_shards()
            if source is not None:
                _carry_over(source, self._folder.path)
            self._describe(config)
            _write_json(self._folder.path / REPORT, report)
            self._shards.remove_tails()
            shutil.rmtree(self._folder.path / _SCRATCH, ignore_errors=True)
            self._folder.commit(overwrite=self._overwrite, without=JOURNAL)
        self._folder = None
        return self.output

    def _name_shards(self) -> None:
        count = len(self._shards)
        files = [self.format.shard_name(i, count) for i in range(1, count + 1)]
        self._shards.name(files)
        if index := self.format.index_name(count):
            weight_map = {name: files[number - 1] for name, number in self._shards.numbers.items()}
            content = {"metadata": {"total_size": self._shards.nbytes}, "weight_map": weight_map}
            _write_json(self._open().path / index, content)

    def _describe(self, config: Mapping[str, Any]) -> None:
        description = self.format.describe(list(self._shards.numbers), self._linears.schemes, config)
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        if description.quantization_config:
            config["quantization_config"] = description.quantization_config
        folder = self._open().path
        for name, content in {"config.json": config, **description.files}.items():
            _write_json(folder / name, content)

    def _open(self) -> PartialFolder:
        if self._folder is None:
            raise QtoolError("the checkpoint is closed", where=str(self.output))
        return self._folder


def _carry_over(source: Checkpoint, folder: Path) -> None:
    for file in companions(source):
        target = folder / file
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path / file, target)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_bytes(encode_json(content, indent=2))
