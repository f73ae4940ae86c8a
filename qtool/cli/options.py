"""Options and conventions that every command shares.

A command takes `Printed` (or `json: Json = False, quiet: Quiet = False, debug: Debug = False`) and makes its console
with `console()`; the values are also kept in `common`, so that an error is printed the same way.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from qtool import sizes
from qtool.cli.helptexts import MESSAGES
from qtool.errors import InputError, in_one_line

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.jobs.models import Model


def size(text: str, option: str) -> int:
    """Bytes of a size such as 4GB, 500MiB or 12345. Raises InputError."""
    nbytes = sizes.parse(text)
    if nbytes is None:
        raise InputError(f"{text!r} is not a size", where=option, hint="write it as 4GB or 500MiB")
    return nbytes


@dataclass
class Common:
    """What --json, --quiet, --debug and --offline said in this process; and what it says after Ctrl-C.

    Attributes:
        again: how the work goes on where it stopped; None where it begins anew.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    offline: bool = False
    again: str | None = None


common = Common()


def _keep(param: typer.CallbackParam, value: bool) -> bool:
    setattr(common, str(param.name), value)
    return value


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", callback=_keep, is_eager=True)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the result and errors.", callback=_keep, is_eager=True)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_keep, is_eager=True)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
]


Offline = Annotated[
    bool,
    typer.Option("--offline", help="Never use the network; so does HF_HUB_OFFLINE=1.", callback=_keep, is_eager=True),
]
MODEL = "A model folder, ORG/NAME on a hub or a GGUF file, or - to read it from standard input."
"""What an argument that names a model may be (see `find_model`)."""


@dataclass(frozen=True)
class Shown:
    """How much is told; `common` has it too."""

    panel: ClassVar[str] = MESSAGES

    quiet: Quiet = False
    debug: Debug = False


@dataclass(frozen=True)
class Printed:
    """The same, of a command whose result can be JSON."""

    panel: ClassVar[str] = MESSAGES

    json: Json = False
    quiet: Quiet = False
    debug: Debug = False


def console(doing: str | None = None) -> Console:
    """The console as --quiet and --json ask for.

    Args:
        doing: what a terminal shows from the first moment. Workers take seconds before they have something to tell.
    """
    from qtool.console import Console

    return Console(quiet=common.quiet, json=common.json, doing=doing)


def resumable(*, by: str | None = "--resume") -> None:
    """From now on, an interruption tells the command that goes on: this one, with the option `by`."""
    words = ["qtool", *sys.argv[1:]]
    if by is not None and by not in words:
        words.append(by)
    if "-" not in words:  # what came from another command is gone
        common.again = f"To go on from what is finished: {shlex.join(words)}"


def path_or_stdin(value: str) -> str:
    """`value`, or for `-` the path on the first line of standard input, so that commands pipe into each other.

    Raises:
        InputError: standard input holds no path.
    """
    if value != "-":
        return value
    try:
        path = sys.stdin.readline().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise InputError(f"can't be read: {in_one_line(error)}", where="standard input") from None
    if not path:
        raise InputError(
            "no path on standard input", where="-", hint="the command before the pipe printed nothing: see its error"
        )
    return path


def find_model(value: str, out: Console) -> Model:
    """The model that an argument names (`-`: that standard input names), fetched first if need be. Raises as `find`."""
    from qtool.jobs.models import Access, find

    return find(path_or_stdin(value), Access(common.offline, out.event, out.info))
