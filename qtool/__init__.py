"""qtool: a language model from a hub to a W8A8 checkpoint to generated text.

As a library it has a function for each of its main commands: see `qtool.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qtool.api import (
        Answer,
        Choice,
        InputError,
        QtoolError,
        download,
        evaluate,
        generate,
        inspect,
        quantize,
    )

# Not `convert`: that is a package of this one, with the same function in it as `convert.convert`.
_API = {"Answer", "Choice", "InputError", "QtoolError", "download", "evaluate", "generate", "inspect", "quantize"}


def __getattr__(name: str) -> Any:
    """The functions of `qtool.api`, imported when somebody asks for one: commands start without them."""
    if name in _API:
        from qtool import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
