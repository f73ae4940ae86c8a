"""qtool: a language model from a hub to a W8A8 checkpoint to generated text.

As a library it has a function for each of its main commands: see `qtool.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.version import __version__ as __version__

if TYPE_CHECKING:
    from qtool.api import Answer as Answer
    from qtool.api import Choice as Choice
    from qtool.api import InputError as InputError
    from qtool.api import QtoolError as QtoolError
    from qtool.api import convert as convert
    from qtool.api import download as download
    from qtool.api import evaluate as evaluate
    from qtool.api import generate as generate
    from qtool.api import inspect as inspect
    from qtool.api import quantize as quantize

_API = {
    *("Answer", "Choice", "InputError", "QtoolError"),
    *("convert", "download", "evaluate", "generate", "inspect", "quantize"),
}


def __getattr__(name: str) -> Any:
    """The functions of `qtool.api`, imported when somebody asks for one: commands start without them."""
    if name in _API:
        from qtool import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
