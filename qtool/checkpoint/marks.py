"""What of a checkpoint that is being written is finished work, so that another writer can go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtool.checkpoint.journal import Journal
from qtool.checkpoint.linears import Linears
from qtool.checkpoint.shards import Shards
from qtool.files import sync


class Marks:
    """Keeps the journal of one writer. Everything raises OSError as the disk does.

    Args:
        folder: where the journal lies.
        key: of the job.
        entries: of the journal that this writer goes on from.

    Attributes:
        records: what `mark` was given in earlier runs.
        any: there is something to go on from.
    """

    def __init__(self, folder: Path, key: str, entries: list[dict[str, Any]], shards: Shards, linears: Linears) -> None:
        self.records: list[dict[str, Any]] = [entry["record"] for entry in entries if entry["record"] is not None]
        self.any = bool(entries)
        self._journal = Journal(folder, key, entries)
        self._shards = shards
        self._linears = linears
        self._needed: list[Path] = []
        self._obsolete: list[Path] = []

    def mark(self, record: dict[str, Any], *, needs: Sequence[Path], obsolete: Sequence[Path]) -> None:
        """See `CheckpointWriter.mark`."""
        self._note(record)
        self.any = True
        self._needed += needs
        self._obsolete += obsolete
        if self._journal.due:
            self._sync()

    def finish(self) -> None:
        """Before the shards are named: an unfinished one can be restored only as long as its tail is there."""
        if self.any:
            self._note(None)
            self._sync()

    def close(self) -> None:
        self._journal.close()

    def _note(self, record: dict[str, Any] | None) -> None:
        """Journal what the shards hold; without a record it is no more than that."""
        self._journal.append({"record": record, "shards": self._shards.state(), "linears": self._linears.state()})

    def _sync(self) -> None:
        """What a machine that goes down would lose otherwise goes to the disk; then what it replaces can go."""
        self._shards.flush()
        for path in self._needed:
            if path.exists():
                sync(path)
        self._journal.synced()
        for path in self._obsolete:
            path.unlink(missing_ok=True)
        self._shards.remove_tails()
        self._needed, self._obsolete = [], []
