"""The options that `generate`, `chat` and `serve` share: who runs the model, and what its chat template gets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode
from qtool.errors import InputError
from qtool.runtimes.facts import NAMES, RUNTIMES


def _runtime(names: Iterable[str]) -> Any:
    *first, last = names
    return typer.Option(help=f"{', '.join(first)} or {last}.")


Runtime = Annotated[str, _runtime(NAMES)]
Server = Annotated[str, _runtime(("auto", *(runtime.name for runtime in RUNTIMES if runtime.server is not None)))]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of vLLM: of its EngineArgs or, in capitals, a variable."
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option("--enable-thinking/--no-thinking", help="For templates that can.", show_default="the template's own"),
]
ChatTemplateKwargs = Annotated[
    str | None, typer.Option(metavar="JSON", help="Further values for the chat template, as an object.")
]


@dataclass(frozen=True)
class Running:
    """Who runs the model."""

    runtime: Runtime = "auto"
    set_: Set = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class Shown:
    """How much is told; `options.common` has it too."""

    quiet: Quiet = False
    debug: Debug = False


@dataclass(frozen=True)
class Printed:
    """The same, of a command whose result can be JSON."""

    json: Json = False
    quiet: Quiet = False
    debug: Debug = False


def template_kwargs(thinking: bool | None, further: str | None) -> dict[str, Any]:
    """What the chat template gets. Qwen calls the switch `enable_thinking`, DeepSeek and Granite `thinking`."""
    kwargs = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    if further is None:
        return kwargs
    try:
        values = json.loads(further)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError("must be a JSON object", where="--chat-template-kwargs", hint="""Like '{"date": "today"}'.""")
    return kwargs | values
