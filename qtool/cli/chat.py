"""qtool chat: a conversation with a model, in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from qtool.cli import sampling
from qtool.cli.bundle import expanded
from qtool.cli.generation import ChatTemplateKwargs, Running, Thinking, preferred, template_kwargs
from qtool.cli.options import MODEL, Shown, console, find_model
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.console import Console
    from qtool.runtimes import GenerationJob
    from qtool.runtimes.conversation import Conversation, Told

COMMANDS = "/reset forgets what was said, /exit ends (so does Ctrl-D), Ctrl-C stops an answer."


@dataclass(frozen=True)
class Template:
    """What the chat template gets."""

    panel: ClassVar[str] = "Chat"

    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None
    enable_thinking: Thinking = None
    chat_template_kwargs: ChatTemplateKwargs = None


SAMPLING = sampling.bundle(
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    max_tokens={"show_default": "what fits into the context"},
)


@expanded
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    template: Template,
    asked: Annotated[dict[str, Any], SAMPLING],
    running: Running,
    shown: Shown,
) -> None:
    """Talk with a model in the terminal.

    /reset starts a new conversation. /exit or Ctrl-D ends the program. Ctrl-C stops an answer.

    Examples:

      qtool chat ./SmolLM2-W8A8 --system "You are a pirate." --temperature 0.7
    """
    if not sys.stdin.isatty():
        hint = "For prompts from a file or a pipe: qtool generate --chat."
        raise InputError("a conversation needs a terminal", where="stdin", hint=hint)

    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes.conversation import Conversation

    with console("starting") as out:
        job = _job(Checkpoint.open(find_model(model, out).path), template, asked, running, out)

        def event(event: dict[str, Any]) -> None:
            if event.get("stage") != "generate":  # the text shows how far it is
                out.event(event)

        conversation = Conversation(job, system=template.system, on_event=event)
        conversation.ready()
        out.end_progress()
        out.info(COMMANDS, prose=True)
        _talk(conversation, out)
        conversation.close()


def _job(
    checkpoint: Checkpoint, template: Template, asked: Mapping[str, Any], running: Running, out: Console
) -> GenerationJob:
    from qtool import runtimes
    from qtool.runtimes import sampling
    from qtool.runtimes.arguments import parse

    recipe = sampling.of_recipe(checkpoint)
    words = {name: value for name, value in recipe.given().items() if name != "max_tokens"}  # meant for a prompt
    arguments = parse(running.set_ or ())
    prompting = runtimes.Prompting(1, asked, arguments, recipe.reasoning_parser)
    chosen = preferred(running, checkpoint, prompting, out)
    runtimes.check(chosen, asked, arguments)
    return runtimes.GenerationJob(
        model=str(checkpoint.path),
        sampling=chosen.runtime.possible(sampling.merged(sampling.of_model(checkpoint), words, asked)),
        runtime=chosen.name,
        arguments=arguments,
        chat=runtimes.ChatSettings(
            template_kwargs=template_kwargs(template.enable_thinking, template.chat_template_kwargs),
            reasoning_parser=recipe.reasoning_parser if chosen.runtime.vllm else None,
        ),
        trust_remote_code=running.trust_remote_code,
    )


def _talk(conversation: Conversation, out: Console) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            out.piece("\n")
            return
        except KeyboardInterrupt:  # of the line, not of the conversation
            out.piece("\n")
            continue
        if said == "/exit":
            return
        if said == "/reset":
            conversation.reset()
        elif said.startswith("/"):
            out.info(COMMANDS, prose=True)
        elif said:
            _answer(conversation, said, out)


def _answer(conversation: Conversation, said: str, out: Console) -> None:
    from qtool.runtimes.conversation import Refused

    with _interrupting(conversation.stop):
        conversation.ask(said)
        try:
            while (piece := conversation.listen()) is not None:
                out.piece(piece)
            out.piece("\n")
            if (told := conversation.told) is not None:
                out.info(_said(told))
        except Refused as error:
            out.error(error)


def _said(told: Told) -> str:
    """[24 tokens, 35.1 tokens/s]"""
    parts = [f"{told.tokens} tokens"]
    if told.per_second is not None:
        parts.append(f"{told.per_second:.1f} tokens/s")
    if told.finish_reason == "length":
        parts.append("cut off: the limit is reached, see --max-tokens")
    elif told.finish_reason == "abort":
        parts.append("stopped")
    return f"[{', '.join(parts)}]"


@contextlib.contextmanager
def _interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block the first Ctrl-C calls `stop`; only a second one raises KeyboardInterrupt.

    An exception could strike between an answer's last piece and its end, and leave the conversation waiting for both.
    """

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, usual)
        stop()

    usual = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
