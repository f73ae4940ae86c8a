"""qtool chat: a conversation with a model, in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli import sampling as options
from qtool.cli.options import Debug, Quiet, TrustRemoteCode, console
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.runtimes.conversation import Conversation

COMMANDS = "/reset forgets what was said, /exit ends (so does Ctrl-D), Ctrl-C stops an answer."


def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder.")],
    system: Annotated[str | None, typer.Option(help="What the system says first.")] = None,
    enable_thinking: options.Thinking = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most new tokens per answer.", show_default="what the context has room for"),
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    runtime: Annotated[str, typer.Option(help="auto, vllm, transformers, vllm-mindspore or vllm-ascend.")] = "auto",
    set_: options.Set = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a model. /reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer.

    Examples:

      qtool chat ./SmolLM2-W8A8 --system "You are a pirate." --temperature 0.7
    """
    if not sys.stdin.isatty():
        hint = "For prompts from a file or a pipe: qtool generate --chat."
        raise InputError("a conversation needs a terminal", where="stdin", hint=hint)
    asked = options.sampling(context.params)

    from qtool import runtimes
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes import sampling, settings
    from qtool.runtimes.conversation import Conversation

    checkpoint = Checkpoint.open(model)
    chosen = runtimes.choose(runtime, formats.of(checkpoint).name)
    recipe = sampling.of_recipe(checkpoint)
    words = {name: value for name, value in recipe.given().items() if name != "max_tokens"}  # meant for a prompt
    arguments = settings.parse(set_ or ())
    runtimes.check(chosen, asked, arguments)
    with console() as out:
        conversation = Conversation(
            model,
            system=system,
            on_event=lambda event: None if event.get("stage") == "generate" else out.event(event),
            sampling=settings.possible(chosen.name, sampling.merged(sampling.of_model(checkpoint), words, asked)),
            runtime=runtime,
            arguments=arguments,
            chat_template_kwargs=options.template_kwargs(enable_thinking, chat_template_kwargs),
            reasoning_parser=None if chosen.name == "transformers" else recipe.reasoning_parser,
            trust_remote_code=trust_remote_code,
        )
        out.info(COMMANDS)
        _talk(conversation, out)
        conversation.close()


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
            out.info(COMMANDS)
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
        except Refused as error:
            out.error(error)


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
