"""The texts that have names: what a user or a recipe says instead of a file."""

from __future__ import annotations

from qtool.files import expand

BUILTIN = "builtin"  # documentation that comes with every Python
SELF = "self"  # what the model writes


def absolute(data: str) -> str:
    """The same text from any current folder. Raises InputError when a file's home is unknown."""
    return data if data in (BUILTIN, SELF) else str(expand(data).absolute())
