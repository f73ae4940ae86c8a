"""A model from a hub, for a job that goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qtool import workers
from qtool.hub import download, tokens
from qtool.recipe.schema import Repository

_FILES_AT_A_TIME = 4


def run(model: Repository, target: Path, *, on_event: Callable[[workers.Event], None]) -> None:
    """Make `target` the model's folder, or make it whole again; interrupted, it goes on inside the files.

    Raises:
        InputError, QtoolError: as `qtool download`.
    """
    listing = download.find(model.repo, model.hub, model.revision, lambda name: tokens.read(name, None), on_event)
    planned = download.plan(listing, [], [])
    download.obtain(
        planned,
        target,
        tokens.read(listing.hub, None),
        workers=_FILES_AT_A_TIME,
        overwrite=True,
        on_event=on_event,
        waiting=lambda: None,
    )
