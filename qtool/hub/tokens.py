"""Where a token comes from: a file or a variable, never the command line, where every process can read it."""

from __future__ import annotations

import os
from pathlib import Path

from qtool.errors import InputError
from qtool.hub.access import TOKEN_VARIABLES

_MAX_BYTES = 10_000


def read(hub: str, file: Path | None) -> str | None:
    """The token for a hub: from `file`, else from the hub's variable; None when there is neither.

    (For Hugging Face the client then looks for the one that `hf auth login` stored.)

    Raises:
        InputError: no such file, or what is in it is no token. The message never has the content.
    """
    if file is None:
        variable = TOKEN_VARIABLES[hub]
        return _checked(os.environ.get(variable, "").strip(), variable) or None
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_BYTES).decode().strip()
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError:
        raise InputError("does not hold a token: not text", where=str(file)) from None
    if not text:
        raise InputError("does not hold a token: it is empty", where=str(file))
    return _checked(text, str(file))


def _checked(token: str, where: str) -> str:
    if not all("!" <= character <= "~" for character in token):
        hint = "A token is one line of letters, digits and signs."
        raise InputError("does not hold a token: it has blanks, line ends or other characters", where=where, hint=hint)
    return token
