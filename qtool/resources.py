"""Where the files are that ship with qtool and are no Python: recipes and configurations."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def folder(name: str) -> Traversable:
    """The folder `name` ("recipes", "configs"): inside the package when installed, beside it in a checkout."""
    shipped = files("qtool") / "_data" / name
    return shipped if shipped.is_dir() else Path(__file__).resolve().parent.parent / name
