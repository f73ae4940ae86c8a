"""Chat templates are programs of the model's author: they run in a process whose time and memory end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from qtool.errors import InputError, in_one_line, one_line
from qtool.workers import processes
from qtool.workers.limited import Ended, Helper, Refused

SECONDS = 10.0  # of processor time for one conversation
MEGABYTES = 512

# What PreTrainedTokenizerBase.apply_chat_template does with a template (transformers 5.19), and nothing else.
_PROGRAM = """
from transformers.utils.chat_template_utils import render_jinja_template

def render(request):
    return render_jinja_template([request["messages"]], chat_template=request["template"], **request["options"])[0][0]

serve(render)
"""


def _interpreter(*arguments: str) -> tuple[list[str], dict[str, str]]:
    return processes.python(sys.executable, *arguments)


_renderer = Helper(_PROGRAM, SECONDS, MEGABYTES << 20, _interpreter)


def render(tokenizer: Any, messages: Sequence[Any], what: str, where: str | None = None, **options: Any) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: transformers' own, with a template.
        messages: dicts with role and content, as JSON can say them.
        what: what it refuses, for messages: "these messages".
        where: the messages come from there.
        options: for apply_chat_template, and further ones for the template itself.

    Raises:
        InputError: the template refuses them, or takes too much time or memory.
    """
    try:
        if not _is_plain(tokenizer):  # such a tokenizer is a program as a whole
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        if not messages:
            raise Refused("there are none")
        if options.get("continue_final_message") and options.get("add_generation_prompt"):
            raise Refused("continue_final_message and add_generation_prompt exclude each other")
        request = {
            "template": tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools")),
            "messages": messages,
            "options": {**tokenizer.special_tokens_map, **options},
        }
        return str(_renderer.ask(request)[0])
    except Ended:
        raise _endless(where) from None
    except Refused as error:
        told = one_line(str(error))[:300]
        raise InputError(f"the model's chat template refuses {what}: {told}", where=where) from None
    except Exception as error:
        raise InputError(f"the model's chat template refuses {what}: {in_one_line(error)}", where=where) from error


def limit_everywhere() -> None:
    """From now on transformers renders templates within the same limits, whoever asks it in this process.

    What takes more ends in an InputError; what a template itself refuses in jinja2's TemplateError, as ever.
    """
    import jinja2
    from transformers import tokenization_utils_base as library

    def rendered(conversations: Sequence[Any], *, chat_template: str, **options: Any) -> tuple[list[str], list[Any]]:
        request = {"template": chat_template, "options": {k: v for k, v in options.items() if v is not None}}
        try:
            texts = [str(_renderer.ask({**request, "messages": messages})[0]) for messages in conversations]
        except Ended:
            raise _endless() from None
        except Refused as error:
            raise jinja2.TemplateError(str(error)) from None
        return texts, []  # the latter says where the assistant speaks, which needs `return_assistant_tokens_mask`

    library.render_jinja_template = rendered


def _endless(where: str | None = None) -> InputError:
    what = f"the model's chat template takes more than {SECONDS:.0f} seconds or {MEGABYTES} MB"
    return InputError(what, where=where, hint="It is in tokenizer_config.json or chat_template.jinja.")


def _is_plain(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
