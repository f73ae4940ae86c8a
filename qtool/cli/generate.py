"""qtool generate: text from a model, quantized or not."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli import sampling as options
from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin
from qtool.cli.printers import Printer, ToFile, ToPipe, ToTerminal
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.runtimes.requests import Chat, Line


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder; - reads the path from stdin (then give --prompt).")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt, or @FILE with prompts; repeat it for more. Without: stdin."),
    ] = None,
    input_format: Annotated[
        str, typer.Option(metavar="auto|text|jsonl", help="What files and stdin hold. auto goes by the first line.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answers to this file, as JSON lines.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --output ends.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says: apply the chat template.")
    ] = False,
    system: options.System = None,
    enable_thinking: options.Thinking = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(help="vLLM's parser that splits thinking from answers.", show_default="from the model's recipe"),
    ] = None,
    max_tokens: options.MaxTokens = None,
    min_tokens: options.MinTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = 0,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Answers per prompt.")] = None,
    stop: options.Stop = None,
    stop_token_ids: Annotated[list[int] | None, typer.Option(help="A token that ends an answer.")] = None,
    include_stop_str_in_output: Annotated[bool | None, typer.Option("--include-stop-str-in-output")] = None,
    ignore_eos: Annotated[bool | None, typer.Option("--ignore-eos", help="Go on after the end of the text.")] = None,
    bad_words: Annotated[list[str] | None, typer.Option(help="A word that never comes.")] = None,
    logit_bias: Annotated[list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit.")] = None,
    allowed_token_ids: Annotated[list[int] | None, typer.Option(help="Only these tokens come.")] = None,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Log-probabilities of so many tokens per place.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(min=0, help="The same for the prompt.")] = None,
    skip_special_tokens: Annotated[
        bool | None, typer.Option("--skip-special-tokens/--no-skip-special-tokens", show_default="skip")
    ] = None,
    json_schema: Annotated[str | None, typer.Option(metavar="FILE", help="Answers are JSON of this schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="Answers match it.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Answers are one of these; repeat it.")] = None,
    runtime: Annotated[str, typer.Option(help="auto, vllm, transformers, vllm-mindspore or vllm-ascend.")] = "auto",
    set_: options.Set = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate text with a model, quantized or not.

    Prompts are lines of text, JSON lines with `prompt` or `messages` (other fields come out again), or an OpenAI batch
    file. On a terminal the text is printed as it is written. Into a pipe, a file or with --json each answer is one
    JSON line, in the order of the prompts: prompt, text, finish_reason, prompt_tokens, completion_tokens; or error, and
    then the exit code is 1 at the end. A batch file's answers have OpenAI's shape. Sampling is named as in vLLM.

    Examples:

      qtool generate ./SmolLM2-W8A8 --prompt "I am" --prompt "Today is"

      qtool generate ./SmolLM2-W8A8 < prompts.txt > answers.jsonl

      qtool generate ./SmolLM2-W8A8 --chat -p @questions.jsonl -o answers.jsonl --resume

      qtool quantize ./SmolLM2 --output ./SmolLM2-W8A8 | qtool generate - --prompt "I am"
    """
    from qtool.runtimes.requests import FORMATS, Chat

    if model == "-" and (not prompt or "@-" in prompt):
        hint = "Give prompts with --prompt, or the model's path as the argument."
        raise InputError("stdin can hold the model's path or the prompts, not both", where="-", hint=hint)
    if resume and output is None:
        raise InputError("what shall be resumed?", where="--resume", hint="Name the file with --output.")
    _check_apart(prompt or ["@-"], output)
    if input_format not in FORMATS:
        raise InputError(f"{input_format!r} is none of {', '.join(FORMATS)}", where="--input-format")
    given = {**context.params, "logit_bias": options.biases(logit_bias or ()) or None}
    structured = {"json": options.json_schema(json_schema), "regex": regex, "choice": choice or None}
    asked = options.sampling(given, structured)
    folder = path_or_stdin(model)

    from qtool import runtimes
    from qtool.checkpoint import formats
    from qtool.checkpoint.reader import Checkpoint
    from qtool.runtimes import sampling, settings
    from qtool.runtimes.requests import count
    from qtool.runtimes.results import Answers, decisive, fingerprint

    checkpoint = Checkpoint.open(folder)
    recipe, words = sampling.of_recipe(checkpoint), sampling.of_model(checkpoint)
    chosen = runtimes.choose(
        runtime, formats.of(checkpoint).name
    )  # whatever is wrong should show before anybody types prompts
    arguments = settings.parse(set_ or ())
    runtimes.check(chosen, asked, arguments, reasoning_parser)
    parser = reasoning_parser or recipe.reasoning_parser
    as_text = sys.stdout.isatty() and not json and output is None
    job: dict[str, Any] = {
        "sampling": settings.possible(chosen.name, sampling.merged(words, recipe.given(), asked)),
        "runtime": runtime,
        "arguments": arguments,
        "chat": chat or system is not None,
        "chat_template_kwargs": options.template_kwargs(enable_thinking, chat_template_kwargs),
        "reasoning_parser": None if as_text or chosen.name == "transformers" else parser,
    }
    lines = _prompts(prompt, Chat(bool(job["chat"]), system), input_format)
    with console() as out, contextlib.ExitStack() as stack:
        printer: Printer
        if output is not None:
            settled = {"model": fingerprint(checkpoint.path), "system": system, **job, "runtime": chosen.name}
            settled["arguments"] = decisive(arguments)
            answers = Answers(output.expanduser(), settled, resume=resume, overwrite=overwrite)
            printer = ToFile(out, stack.enter_context(answers))
        elif as_text:
            ahead = list(itertools.islice(lines, 2))
            lines = itertools.chain(ahead, lines)
            printer = ToTerminal(out, titled=len(ahead) > 1)
        else:
            printer = ToPipe(out)
        if (begun := printer.begin(lines)) is not None:
            numbered = enumerate(begun, printer.done)
            result = runtimes.stream(
                folder,
                printer.requests(numbered),
                printer.answer,
                expected=count(prompt or ["@-"]) - printer.done,
                pieces=as_text,
                trust_remote_code=trust_remote_code,
                on_event=printer.event,
                **job,
            )
            out.end_progress()
            seconds = result["seconds"]["generate"]
            rate = f", {result['tokens'] / seconds:.1f} tokens/s" if seconds else ""
            out.info(f"{result['answers']} answers, {result['tokens']} tokens in {seconds:.1f} s{rate}")
        printer.end()


def _check_apart(prompts: list[str], output: Path | None) -> None:
    """That answers don't go where the prompts come from: they would replace those, or be asked as further ones."""
    from qtool.runtimes.requests import reads

    with contextlib.suppress(OSError):  # such as no file yet
        if reads(prompts, os.fstat(1) if output is None else output.expanduser().stat()):
            where = "standard output" if output is None else f"--output {output}"
            raise InputError("the prompts are in this very file", where=where, hint="Name another file.")


def _prompts(prompt: list[str] | None, chat: Chat, input_format: str) -> Iterator[Line]:
    """The prompts as they come; from a terminal, all of them at once."""
    from qtool.runtimes.requests import read

    typed = not prompt and sys.stdin.isatty()
    if typed:
        print("Prompts, one a line; Ctrl-D ends them.", file=sys.stderr)
    lines = read(prompt or ["@-"], chat, input_format)
    if typed:
        lines = iter(list(lines))
    first = next(lines, None)
    if first is None:
        hint = "Give --prompt TEXT, or one prompt per line on stdin."
        raise InputError("no prompts", where=None if prompt else "stdin", hint=hint)
    return itertools.chain([first], lines)
