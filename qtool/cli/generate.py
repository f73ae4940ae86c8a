"""qtool generate: text from a model, quantized or not."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from qtool.cli import sampling
from qtool.cli.bundle import expanded
from qtool.cli.generation import ChatTemplateKwargs, Running, Thinking, preferred, template_kwargs
from qtool.cli.options import MODEL, Printed, console, find_model, resumable
from qtool.cli.printers import Printer, ToFile, ToPipe, ToTerminal
from qtool.errors import InputError
from qtool.files import expand

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint
    from qtool.console import Console
    from qtool.runtimes import GenerationJob
    from qtool.runtimes.answers import Answers
    from qtool.runtimes.lines import Line


@dataclass(frozen=True)
class Prompts:
    """Where prompts come from."""

    panel: ClassVar[str] = "Prompts"

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT|@FILE",
            help="A prompt, or a file of prompts. Can be repeated.",
            show_default="standard input",
        ),
    ] = None
    input_format: Annotated[
        str,
        typer.Option(
            metavar="auto|text|jsonl", help="The format of files and of standard input. `auto` looks at the first line."
        ),
    ] = "auto"

    @property
    def sources(self) -> list[str]:
        return self.prompt or ["@-"]


@dataclass(frozen=True)
class Output:
    """Where answers go."""

    panel: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the answers to this file, as JSON lines."),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished --output file.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the --output file if it exists.")] = False


@dataclass(frozen=True)
class Chat:
    """How prompts become conversations."""

    panel: ClassVar[str] = "Chat"

    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="With --chat, each prompt is a message of the user, in the chat template. With --raw, it is text that "
            "the model continues.",
            show_default="raw",
        ),
    ] = None
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message. It switches --chat on.")] = (
        None
    )
    enable_thinking: Thinking = None
    chat_template_kwargs: ChatTemplateKwargs = None
    reasoning_parser: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The parser of vLLM that separates thinking from answers.", show_default="the recipe's"
        ),
    ] = None


@expanded
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    prompts: Prompts,
    output: Output,
    chat: Chat,
    asked: Annotated[dict[str, Any], sampling.ALL],
    running: Running,
    printed: Printed,
) -> None:
    """Generate text with a model, quantized or not.

    Prompts are lines of text, JSON lines with `prompt` or `messages`, or an OpenAI batch file. A terminal shows the
    text as it is generated. In a pipe, in a file or with --json, each answer is one JSON line, in the order of the
    prompts. It has the prompt's own fields, and text, finish_reason, prompt_tokens and completion_tokens. If a prompt
    fails, its line has `error` instead, and the exit code at the end is 1. Answers to a batch file have OpenAI's
    format. The sampling options have vLLM's names.

    Examples:

      qtool generate ./SmolLM2-W8A8 --prompt "I am" --prompt "Today is"

      qtool generate ./SmolLM2-W8A8 < prompts.txt > answers.jsonl

      qtool generate ./SmolLM2-W8A8 --chat -p @questions.jsonl -o answers.jsonl --resume

      qtool quantize ./SmolLM2 --output ./SmolLM2-W8A8 | qtool generate - --prompt "I am"
    """
    _check(model, prompts, output, chat)

    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes import requests

    with console("starting") as out, contextlib.ExitStack() as stack:
        checkpoint = Checkpoint.open(find_model(model, out).path)
        as_text = sys.stdout.isatty() and not printed.json and output.output is None
        count = requests.count(prompts.sources) or None
        job = _job(checkpoint, chat, asked, running, out, prompts=count, as_text=as_text)
        if not prompts.prompt:
            out.end_progress()  # somebody may be typing
        lines = _lines(prompts, job, chat.system)
        if chat.chat is None and not job.chat.required:
            lines = _noting(lines, checkpoint, out)
        printer: Printer
        if output.output is not None:
            resumable()
            printer = ToFile(out, stack.enter_context(_file(job, chat.system, output)))
        elif as_text:
            ahead = list(itertools.islice(lines, 2))
            lines = itertools.chain(ahead, lines)
            printer = ToTerminal(out, titled=len(ahead) > 1)
        else:
            printer = ToPipe(out)
        if (begun := printer.begin(lines)) is not None:
            _run(job, prompts, begun, printer)
        printer.end()


def _check(model: str, prompts: Prompts, output: Output, chat: Chat) -> None:
    """What can be said against the options before anything is opened."""
    from qtool.runtimes.requests import FORMATS

    if chat.chat is False and chat.system is not None:
        raise InputError("plain text has no system message", where="--system", hint="Leave out --raw.")

    if model == "-" and "@-" in prompts.sources:
        hint = "Give prompts with --prompt, or the model's path as the argument."
        raise InputError("stdin can hold the model's path or the prompts, not both", where="-", hint=hint)
    if output.resume and output.output is None:
        raise InputError("needs an --output file to continue", where="--resume", hint="Name the file with --output.")
    _check_apart(prompts.sources, output.output)
    if prompts.input_format not in FORMATS:
        raise InputError(f"{prompts.input_format!r} is none of {', '.join(FORMATS)}", where="--input-format")


def _check_apart(prompts: list[str], output: Path | None) -> None:
    """That answers don't go where the prompts come from: they would replace those, or be asked as further ones."""
    from qtool.runtimes.requests import reads

    with contextlib.suppress(OSError):  # such as no file yet
        if reads(prompts, os.fstat(1) if output is None else expand(output).stat()):
            where = "standard output" if output is None else f"--output {output}"
            raise InputError("the prompts are read from the same file", where=where, hint="Name another file.")


def _job(
    checkpoint: Checkpoint,
    chat: Chat,
    asked: Mapping[str, Any],
    running: Running,
    out: Console,
    *,
    prompts: int | None,
    as_text: bool,
) -> GenerationJob:
    """The job, with what the recipe and the model wish for. Whatever is wrong shows before anybody types prompts."""
    from qtool import runtimes
    from qtool.runtimes import sampling
    from qtool.runtimes.arguments import parse

    recipe, words = sampling.of_recipe(checkpoint), sampling.of_model(checkpoint)
    arguments, parser = parse(running.set_ or ()), chat.reasoning_parser or recipe.reasoning_parser
    thinking = parser if chat.reasoning_parser or not as_text else None
    chosen = preferred(running, checkpoint, runtimes.Prompting(prompts, asked, arguments, thinking), out)
    runtimes.check(chosen, asked, arguments, chat.reasoning_parser)
    splits = chosen.runtime.vllm and not as_text
    return runtimes.GenerationJob(
        model=str(checkpoint.path),
        sampling=chosen.runtime.possible(sampling.merged(words, recipe.given(), asked)),
        runtime=chosen.name,
        arguments=arguments,
        chat=runtimes.ChatSettings(
            required=bool(chat.chat) or chat.system is not None,
            template_kwargs=template_kwargs(chat.enable_thinking, chat.chat_template_kwargs),
            reasoning_parser=parser if splits else None,
        ),
        extras=runtimes.Extras(pieces=as_text),
        trust_remote_code=running.trust_remote_code,
    )


def _file(job: GenerationJob, system: str | None, output: Output) -> Answers:
    """The file for the answers, with the settings that whoever continues it must have."""
    from qtool.runtimes.answers import Answers
    from qtool.runtimes.identity import decisive, fingerprint

    assert output.output is not None
    settled = {
        "model": fingerprint(Path(job.model)),
        "system": system,
        "sampling": job.sampling,
        "runtime": job.runtime,
        "arguments": decisive(job.arguments),
        "chat": job.chat.required,
        "chat_template_kwargs": job.chat.template_kwargs,
        "reasoning_parser": job.chat.reasoning_parser,
    }
    return Answers(expand(output.output), settled, resume=output.resume, overwrite=output.overwrite)


def _lines(prompts: Prompts, job: GenerationJob, system: str | None) -> Iterator[Line]:
    """The prompts as they come; from a terminal, all of them at once."""
    from qtool.runtimes import lines as shapes
    from qtool.runtimes.requests import read

    typed = not prompts.prompt and sys.stdin.isatty()
    if typed:
        print("Prompts, one a line; Ctrl-D ends them.", file=sys.stderr)
    lines = read(prompts.sources, shapes.Chat(job.chat.required, system), prompts.input_format)
    if typed:
        lines = iter(list(lines))
    first = next(lines, None)
    if first is None:
        hint = "Give --prompt TEXT, or one prompt per line on stdin."
        raise InputError("no prompts", where=None if prompts.prompt else "stdin", hint=hint)
    return itertools.chain([first], lines)


def _noting(lines: Iterator[Line], checkpoint: Checkpoint, out: Console) -> Iterator[Line]:
    """The lines; where the first is plain text and the model one for conversations, which way is taken is said."""
    from qtool.runtimes.template import has_chat_template

    first = next(lines)
    if isinstance(first.request.get("prompt"), str) and has_chat_template(checkpoint):
        out.info(
            "The model continues each prompt as plain text (--raw). "
            "It has a chat template: --chat asks it as a user does.",
            prose=True,
        )
    return itertools.chain([first], lines)


def _run(job: GenerationJob, prompts: Prompts, lines: Iterator[Line], printer: Printer) -> None:
    """Have the lines answered."""
    from qtool import runtimes
    from qtool.runtimes.requests import count

    job = replace(job, expected=count(prompts.sources) - printer.done)
    requests = printer.requests(enumerate(lines, printer.done))
    done = runtimes.stream(job, requests, printer.answer, printer.event)
    printer.out.end_progress()
    seconds = done.seconds["generate"]
    rate = f", {done.tokens / seconds:.1f} tokens/s" if seconds else ""
    answers = "1 answer" if done.answers == 1 else f"{done.answers} answers"
    printer.out.info(f"{answers}, {done.tokens} tokens in {seconds:.1f} s{rate}")
