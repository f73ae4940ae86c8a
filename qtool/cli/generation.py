"""The options that `generate`, `chat` and `serve` share: who runs the model, and what its chat template gets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from qtool.cli.options import Offline, TrustRemoteCode
from qtool.errors import InputError
from qtool.runtimes.facts import NAMES, RUNTIMES

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.console import Console
    from qtool.runtimes import Launch, Prompting


def _runtime(names: Iterable[str]) -> Any:
    return typer.Option(metavar="|".join(names), help="The runtime to use.")


Runtime = Annotated[str, _runtime(NAMES)]
Server = Annotated[str, _runtime(("auto", *(runtime.name for runtime in RUNTIMES if runtime.server is not None)))]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of vLLM: a field of EngineArgs or, in capitals, a variable. Can be repeated.",
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--enable-thinking/--no-thinking",
        help="Switch thinking on or off, where the chat template can.",
        show_default="the template's own",
    ),
]
ChatTemplateKwargs = Annotated[
    str | None, typer.Option(metavar="JSON", help="More values for the chat template, as a JSON object.")
]


@dataclass(frozen=True)
class Running:
    """Who runs the model."""

    panel: ClassVar[str] = "Runtime"

    runtime: Runtime = "auto"
    set_: Set = None
    offline: Offline = False
    trust_remote_code: TrustRemoteCode = False


def preferred(running: Running, checkpoint: Checkpoint, prompting: Prompting, out: Console) -> Launch:
    """Who does it; where `auto` had a choice, what it chose is said, and why."""
    from qtool import runtimes

    found = runtimes.prefer(running.runtime, checkpoint, prompting, out.event)
    if found.why is not None:
        out.info(found.why, prose=True)
    return found.launch


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
