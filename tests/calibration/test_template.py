"""Chat templates in a process of their own: the same text, and an end to those that have none."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.calibration import template
from qtool.calibration.template import render
from qtool.errors import InputError

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief: ä €"},
    {"role": "user", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    {"role": "assistant", "content": "Hello"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}{{ add_generation_prompt }}",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}",
    "own variables": "{% if enable_thinking %}T{% endif %}{{ messages | length }}{{ tools }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ loop.index }}{% endfor %}{% endfor %}"
HUGE = "{% set n = namespace(x='x' * 1000000) %}{% for a in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.deepcopy(tiny_tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True, "enable_thinking": True, "tools": [{"name": "f"}]}]
)
def test_the_text_is_that_of_transformers(tokenizer: Any, name: str, options: dict[str, Any]) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert render(tokenizer, MESSAGES, "it", **options) == expected


@pytest.mark.parametrize("text", [ENDLESS, HUGE], ids=["endless", "huge"])
def test_one_without_end_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    from qtool.workers.limited import Helper

    monkeypatch.setattr(template, "_renderer", Helper(template._PROGRAM, 1, 256 << 20, template._interpreter))
    tokenizer.chat_template = text
    with pytest.raises(InputError, match="takes more than 10 seconds or 512 MB"):
        render(tokenizer, MESSAGES, "it")
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, MESSAGES, "it") == MESSAGES[0]["content"]


def test_others_in_this_process_have_the_limits_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lm_eval, which asks transformers itself."""
    import jinja2
    from transformers import tokenization_utils_base as library

    from qtool.workers.limited import Helper

    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    expected = {}
    for name, text in TEMPLATES.items():
        tokenizer.chat_template = text
        expected[name] = tokenizer.apply_chat_template(MESSAGES, **options)
    monkeypatch.setattr(library, "render_jinja_template", None)  # put back at the end
    monkeypatch.setattr(template, "_renderer", Helper(template._PROGRAM, 1, 256 << 20, template._interpreter))
    template.limit_everywhere()
    for name, text in TEMPLATES.items():
        tokenizer.chat_template = text
        assert tokenizer.apply_chat_template(MESSAGES, **options) == expected[name]
        assert tokenizer.apply_chat_template([MESSAGES], **options) == [expected[name]]
    tokenizer.chat_template = ENDLESS
    with pytest.raises(InputError, match="takes more than"):
        tokenizer.apply_chat_template(MESSAGES, **options)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(jinja2.TemplateError, match="no system"):
        tokenizer.apply_chat_template(MESSAGES, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{% for %}", "refuses it"),
        ("{{ messages.nothing.at.all }}", "refuses it"),
        ("{{ 10 ** 400 | int }}" + "{{ (1).__class__.__mro__ }}", "refuses it"),
        ("{{ '%s' % ('x' | center(10000000000)) }}", "chat template"),
    ],
)
def test_one_that_fails(tokenizer: Any, text: str, message: str) -> None:
    tokenizer.chat_template = text
    with pytest.raises(InputError, match=message) as raised:
        render(tokenizer, MESSAGES, "it", "here")
    assert raised.value.where == "here"


def test_on_the_command_line(tiny_llama: Path, tmp_path: Path, run_qtool: Callable[..., Any]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(HUGE)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    done = run_qtool(
        "quantize", model, "--calibration", data, "-o", tmp_path / "out", "--samples", "1", "--seq-len", "8"
    )
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "chat template takes more than" in done.stderr
    assert f"{data}:1" in done.stderr
