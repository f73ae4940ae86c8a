"""qtool generate: text from a model, quantized or not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool.cli.options import Debug, Json, Quiet, TrustRemoteCode, console, path_or_stdin
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.console import Console
    from qtool.recipe.schema import Generate

ANSWER = ("prompt", "text", "finish_reason", "prompt_tokens", "completion_tokens")


def generate(
    model: Annotated[str, typer.Argument(help="Model folder; - reads the path from stdin (then give --prompt).")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt; repeat it for more. Without: stdin, one a line."),
    ] = None,
    runtime: Annotated[str, typer.Option(help="auto, vllm, transformers, vllm-mindspore or vllm-ascend.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most new tokens per prompt.", show_default="from the model's recipe")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy.", show_default="from the model's recipe")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of probability drawn from.", show_default="from the model's recipe"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Prompt i draws from seed + i.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate text with a model, quantized or not.

    On a terminal the answers are printed as text. Into a pipe or with --json each is one JSON line, in the
    order of the prompts: prompt, text, finish_reason, prompt_tokens, completion_tokens.

    Examples:

      qtool generate ./SmolLM2-W8A8 --prompt "I am" --prompt "Today is"

      qtool generate ./SmolLM2-W8A8 < prompts.txt > answers.jsonl

      qtool quantize ./SmolLM2 --output ./SmolLM2-W8A8 | qtool generate - --prompt "I am"
    """
    if model == "-" and not prompt:
        hint = "Give prompts with --prompt, or the model's path as the argument."
        raise InputError("stdin can hold the model's path or the prompts, not both", where="-", hint=hint)
    if top_p == 0:
        raise InputError("must be above 0", where="--top-p", hint="1 draws from all tokens.")
    folder = path_or_stdin(model)

    from qtool import runtime as runtimes
    from qtool.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(folder)
    runtimes.choose(runtime, checkpoint.format)  # whatever is wrong should show before anybody types prompts
    prompts = prompt or _read_prompts()
    defaults = _defaults(checkpoint.config)
    with console() as out:
        as_text = sys.stdout.isatty() and not json
        printer = _Printer(out, as_text, titled=len(prompts) > 1)
        runtimes.generate(
            folder,
            prompts,
            runtime=runtime,
            max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
            temperature=defaults.temperature if temperature is None else temperature,
            top_p=defaults.top_p if top_p is None else top_p,
            seed=seed,
            trust_remote_code=trust_remote_code,
            on_event=printer.event,
        )


class _Printer:
    """Prints answers in the order of the prompts, each as soon as it and all before it are there."""

    def __init__(self, out: Console, as_text: bool, titled: bool) -> None:
        self.out, self.as_text, self.titled = out, as_text, titled
        self.waiting: dict[int, dict[str, Any]] = {}
        self.next = 0

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] != "item":
            self.out.event(event)
            return
        self.waiting[event["data"]["index"]] = event["data"]
        while (answer := self.waiting.pop(self.next, None)) is not None:
            self.next += 1
            self.out.result(self._shown(answer), more=True)

    def _shown(self, answer: dict[str, Any]) -> str | dict[str, Any]:
        if self.as_text:
            return f"{answer['prompt']}{answer['text']}" + ("\n" if self.titled else "")
        return {key: answer[key] for key in ANSWER}


def _read_prompts() -> list[str]:
    if sys.stdin.isatty():
        print("Prompts, one a line; Ctrl-D ends them.", file=sys.stderr)
    try:
        lines = sys.stdin.buffer.read().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        hint = "Prompts are UTF-8 text, one a line."
        raise InputError(f"byte {error.start} is not UTF-8", where="stdin", hint=hint) from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        hint = "Give --prompt TEXT, or one prompt per line on stdin."
        raise InputError("no prompts", where="stdin", hint=hint)
    return prompts


def _defaults(config: dict[str, Any]) -> Generate:
    from qtool.recipe.load import match
    from qtool.recipe.schema import Generate

    try:
        return match(config)[0].generate
    except InputError:  # no recipe fits
        return Generate()
