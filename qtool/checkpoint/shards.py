"""A model's tensors in shards, filled one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.shard import Shard

if TYPE_CHECKING:
    import torch

_LEAST = 16  # tensors that every header has room for


@dataclass(frozen=True)
class Sharding:
    """How a model is cut into files.

    Attributes:
        max_bytes: upper bound for a file, unless a single tensor is larger.
        expected_tensors: how many will come, roughly; more only means more shards.
    """

    max_bytes: int = 4 * 10**9
    expected_tensors: int = 4096


class Shards:
    """Streams tensors into files `shard-1`, `shard-2`, … of `folder`. Everything raises OSError as the disk does.

    Attributes:
        numbers: the shard of every tensor, from 1, by its name.
    """

    def __init__(self, folder: Path, sharding: Sharding) -> None:
        self.numbers: dict[str, int] = {}
        self._folder = folder
        self._sharding = sharding
        self._all: list[Shard] = []
        self._first_open = 1  # the first shard that has changed since `state`

    def __len__(self) -> int:
        return len(self._all)

    @property
    def nbytes(self) -> int:
        """Size of the tensors so far."""
        return sum(shard.nbytes for shard in self._all)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append contiguous tensors in main memory, all of them to one shard, in this order."""
        last = self._all[-1] if self._all else None
        if last is None or last.finished or not last.fits(tensors, self._sharding.max_bytes):
            self.finish()
            expected = max(_LEAST, self._sharding.expected_tensors - len(self.numbers))
            last = Shard(self._path(len(self._all) + 1), expected)
            self._all.append(last)
        for name, tensor in tensors.items():
            last.add(name, tensor)
            self.numbers[name] = len(self._all)

    def finish(self) -> None:
        """No more tensors go into the last shard."""
        if self._all and not self._all[-1].finished:
            self._all[-1].finish()

    def name(self, files: list[str]) -> None:
        """Give the finished shards their names in the model."""
        for shard, file in zip(self._all, files, strict=True):
            shard.path.rename(self._folder / file)

    def close(self) -> None:
        for shard in self._all:
            shard.close()

    # ------------------------------------------------------------------ to be resumed

    def state(self) -> dict[str, Any]:
        """What was added since the last call, for `restore`."""
        changed = {str(i): s.state() for i, s in enumerate(self._all, 1) if i >= self._first_open}
        self._count_finished()
        return changed

    def restore(self, states: Iterable[dict[str, Any]], shard_name: Callable[[int, int], str]) -> None:
        """Be what it was at the last of these `state`s; what came later is cut off.

        Args:
            states: all of them, in order.
            shard_name: what shard i of n is called in the model: its writer may have ended after it was named so.
        """
        of_shard: dict[int, list[dict[str, Any]]] = {}
        for changed in states:
            for key, state in changed.items():
                of_shard.setdefault(int(key), []).append(state)
                self.numbers |= dict.fromkeys((part["name"] for _, part in state["entries"]), int(key))
        for number, changes in sorted(of_shard.items()):
            path, named = self._path(number), self._folder / shard_name(number, len(of_shard))
            if named.exists() and not path.exists():
                named.rename(path)
            self._all.append(Shard.restore(path, changes))
        self._count_finished()
        known = {path for shard in self._all for path in (shard.path, shard.tail_path)}
        for path in self._folder.glob("shard-*"):
            if path not in known:
                path.unlink()

    def flush(self) -> None:
        """Have all of it on the disk before going on."""
        for shard in self._all:
            shard.flush()

    def remove_tails(self) -> None:
        """Once nothing will be restored from before a shard was finished."""
        for shard in self._all:
            if shard.finished:
                shard.remove_tail()

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number}"

    def _count_finished(self) -> None:
        self._first_open = next((i for i, s in enumerate(self._all, 1) if not s.finished), len(self._all) + 1)
