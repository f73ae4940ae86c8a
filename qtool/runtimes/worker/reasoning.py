"""Thinking apart from answers, by the parsers that vLLM has."""

from __future__ import annotations

from collections.abc import Callable

from qtool.errors import InputError, foreign
from qtool.runtimes.worker.front import Front


def splitter(front: Front) -> Callable[[str], tuple[str | None, str]]:
    """What splits a text into thinking (or None) and answer, by the parser that vLLM has for such models.

    Raises:
        InputError: vLLM has no parser of this name, or the tokenizer lacks the parser's marks.
    """
    try:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    except ImportError:  # an older vLLM, as Ascend has
        from vllm.entrypoints.openai.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    name = front.job.chat.reasoning_parser
    request = ChatCompletionRequest(messages=[], model="")
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)
    except KeyError as error:
        hint = f"vLLM has {', '.join(sorted(ReasoningParserManager.list_registered()))}."
        raise InputError(f"no reasoning parser {name!r}", where="--reasoning-parser", hint=hint) from error
    with foreign("this parser can't read the model's tokenizer", where=f"--reasoning-parser {name}"):
        parser(front.tokenizer, chat_template_kwargs=dict(front.job.chat.template_kwargs))
    ends = [front.tokenizer.decode([token]) for token in front.stop]

    def split(text: str) -> tuple[str | None, str]:
        for end in ends:
            text = text.removesuffix(end)
        made = parser(front.tokenizer, chat_template_kwargs=dict(front.job.chat.template_kwargs))
        thought, answer = made.extract_reasoning(text, request)
        return thought, answer or ""

    return split
