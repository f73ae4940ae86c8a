"""Writing a checkpoint: tensor by tensor into shards, and all of it or nothing at the output path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.formats import Format, Mode
from qtool.checkpoint.formats.common import fused_name
from qtool.checkpoint.reader import REPORT, Checkpoint
from qtool.checkpoint.shard import Shard
from qtool.checkpoint.storage import PartialFolder, check_free_space, check_output, disk_errors, tidy
from qtool.errors import QtoolError

if TYPE_CHECKING:
    import torch

    from qtool.quant.types import QuantizedLinear

_MAX_NAME = 1000

__all__ = ["CheckpointWriter", "check_free_space", "check_output"]


class CheckpointWriter:
    """Streams a model to `output`, which comes into being complete, in `finish`, or not at all.

    A context manager: leaving it without `finish` (an error, Ctrl-C) removes everything written. No tensor is
    kept in memory.

    Args:
        output: the folder to make.
        format: from `formats.get`.
        overwrite: replace a model folder at `output`, in `finish`.
        max_shard_bytes: upper bound for a file, unless a single tensor is larger.
        expected_tensors: how many tensors will come, roughly; more only means more shards.

    Raises:
        InputError: the output exists (without `overwrite`), or is something else than a model folder.
    """

    def __init__(
        self,
        output: str | Path,
        format: Format,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = 4 * 10**9,
        expected_tensors: int = 4096,
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
        tidy(self.output)
        check_output(self.output, overwrite=overwrite)
        self._folder: PartialFolder | None = PartialFolder(self.output)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._folder is not None:
            for shard in self._shards:
                shard.close()
            self._folder.discard()
            self._folder = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor as it is, under its full name ("model.norm.weight").

        Raises QtoolError when the disk is full or the name is taken.
        """
        if tensor.ndim == 2 and name.endswith(".weight"):
            self._linears[name.removesuffix(".weight")] = "float"
        self._write(name, tensor)

    def add_linear(self, name: str, linear: QuantizedLinear, dtype: torch.dtype) -> None:
        """Write a quantized layer, by its name without ".weight", into a model of dtype `dtype`.

        Raises QtoolError as `add`, or when runtimes fuse this layer with one that has another input scale.
        """
        fused = fused_name(name)
        inputs = (linear.input_scale, linear.input_offset)
        if fused and self._inputs.setdefault(fused, inputs) != inputs:
            raise QtoolError(
                f"input scale and offset {inputs} differ from {self._inputs[fused]} of its siblings; "
                "runtimes load one of them for all",
                where=name,
            )
        self._linears[name] = "static" if linear.is_static else "dynamic"
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
            if not self._shards or not self._shards[-1].fits(name, tensor, self._max_shard_bytes):
                if self._shards:
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
            InputError: output and source overlap, or the output has come into being meanwhile.
            QtoolError: the disk is full, or no tensor was written.
        """
        if self._folder is None or not self._shards:
            raise QtoolError("no tensors were written", where=str(self.output))
        check_output(self.output, overwrite=self._overwrite, source=source.path if source else None)
        folder, count = self._folder.path, len(self._shards)
        with disk_errors(self.output, 0):
            self._shards[-1].finish()
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
            self._folder.commit(overwrite=self._overwrite)
        self._folder = None
        return self.output


def _carry_over(source: Checkpoint, folder: Path) -> None:
    for file in source.companions():
        target = folder / file
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path / file, target)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
