"""The texts that have names: what a user or a recipe says instead of a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qtool.errors import InputError
from qtool.files import expand

BUILTIN = "builtin"  # passages that come with qtool, and documentation that comes with every Python
SELF = "self"  # what the model writes

SUFFIXES = (".txt", ".jsonl", ".parquet")
PASSAGES = Path(__file__).with_name("passages.txt")  # separated by lines of %%
_KINDS = "use builtin, or a .txt, .jsonl or .parquet file"


def built_in_files() -> list[Path]:
    """What the built-in text is made of."""
    topics = importlib.util.find_spec("pydoc_data.topics")
    assert topics is not None
    assert topics.origin is not None
    return [Path(topics.origin), PASSAGES]


def absolute(data: str) -> str:
    """The same text from any current folder. Raises InputError when a file's home is unknown."""
    return data if data in (BUILTIN, SELF) else str(expand(data).absolute())


def check(data: str) -> None:
    """Refuse a text that can't be read, before any work.

    Raises:
        InputError: no such file, one that can't be opened, or of an unknown kind.
    """
    if data in (BUILTIN, SELF):
        return
    path = expand(data)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError("unknown kind of text", where=data, hint=_KINDS)
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise InputError("no such text file", where=str(path), hint=_KINDS) from None
    except OSError as error:
        raise InputError(f"can't read the text file: {error.strerror}", where=str(path)) from None
