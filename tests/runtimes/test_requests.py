"""Prompts as people have them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError
from qtool.runtimes.batch import CHAT_URL, COMPLETIONS_URL
from qtool.runtimes.lines import Chat, Line
from qtool.runtimes.requests import count, read

USER = [{"role": "user", "content": "hi"}]


def lines(
    tmp_path: Path, content: str | bytes, name: str = "file.txt", format: str = "auto", **chat: Any
) -> list[Line]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read([f"@{file}"], Chat(**chat), format))


def test_arguments() -> None:
    found = list(read(["a\nb", "@@at", '{"prompt": "x"}'], Chat()))
    assert [line.request for line in found] == [{"prompt": "a\nb"}, {"prompt": "@at"}, {"prompt": '{"prompt": "x"}'}]
    with pytest.raises(InputError, match="No such file"):
        list(read(["@/absent/file"], Chat()))


@pytest.mark.parametrize("size", [1, 1 << 16, 1 << 18])
def test_text_lines(tmp_path: Path, size: int) -> None:
    long = "é" * size
    found = lines(tmp_path, f"\ufeffone\r\n\n  \n{long}\n two \u2028 x")
    assert [line.fields for line in found] == [{"prompt": "one"}, {"prompt": long}, {"prompt": " two \u2028 x"}]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b'{"prompt": "a"}\n{"prompt": [1, 2]}')
    os.close(write_end)
    kept = os.dup(0)
    os.dup2(read_end, 0)
    try:
        found = list(read(["@-"], Chat()))
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(read_end)
    assert [line.request for line in found] == [{"prompt": "a"}, {"prompt": [1, 2]}]


def test_json_lines_keep_their_fields(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "x", "tags": ["a"]}, {"messages": USER, "id": "é"}]
    found = lines(tmp_path, "\n".join(map(json.dumps, rows)))
    assert [line.fields for line in found] == rows
    assert [line.request for line in found] == [{"prompt": "x"}, {"messages": USER}]


def test_the_first_line_or_the_name_says_what_a_file_holds(tmp_path: Path) -> None:
    assert lines(tmp_path, '{"prompt": "x"}')[0].request == {"prompt": "x"}
    assert lines(tmp_path, "{% if x %}\n{}")[1].request == {"prompt": "{}"}
    assert "not JSON" in lines(tmp_path, "plain", "file.jsonl")[0].request["error"]
    assert lines(tmp_path, '{"prompt": "x"}', format="text")[0].request == {"prompt": '{"prompt": "x"}'}
    assert "not JSON" in lines(tmp_path, "plain", format="jsonl")[0].request["error"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"text": "x"}', "neither prompt nor messages"),
        ('{"prompt": 3}', "neither a text"),
        ('{"prompt": [true]}', "neither a text"),
        ('{"prompt": []}', "neither a text"),
        ('{"messages": "x"}', "messages"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"content": "x"}]}', "messages"),
    ],
)
def test_a_bad_line_has_its_own_error(tmp_path: Path, line: str, error: str) -> None:
    before, bad, after = lines(tmp_path, f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}')
    assert error in bad.request["error"]
    assert (before.request, after.request) == ({"prompt": "a"}, {"prompt": "b"})


def test_chat(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    content = '{"prompt": "hi"}\n' + json.dumps({"messages": USER}) + "\n" + json.dumps({"messages": [system, *USER]})
    plain, messages, own = (line.request for line in lines(tmp_path, content, every=True, system="you are"))
    assert plain == messages == {"messages": [{"role": "system", "content": "you are"}, *USER]}
    assert own == {"messages": [system, *USER]}
    assert lines(tmp_path, "hi", every=True)[0].request == {"messages": USER}
    assert lines(tmp_path, "hi", system="x")[0].request == {"prompt": "hi"}


def batch(url: str, body: Any, **changed: Any) -> str:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body} | changed)


def test_batch_files(tmp_path: Path) -> None:
    """Bodies as OpenAI's reference has them (chat completions, completions, batch)."""
    schema = {"type": "object"}
    body = {
        "model": "m",
        "messages": USER,
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "stop": "END",
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"42": -100},
        "user": "someone",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    completion = {"prompt": "x", "logprobs": 2, "n": 3, "seed": 5, "stop": ["a", "b"], "top_k": 4}
    content = f"{batch(CHAT_URL, body)}\n{batch(COMPLETIONS_URL, completion)}\n"
    chat, plain = lines(tmp_path, content)
    assert chat.url == CHAT_URL
    assert chat.request["messages"] == USER
    assert chat.request["sampling"] == {
        "max_tokens": 9,
        "temperature": 0.5,
        "stop": ["END"],
        "logprobs": 3,
        "logit_bias": {42: -100.0},
        "structured_outputs": {"json": schema},
    }
    assert plain.request["prompt"] == "x"
    assert plain.request["sampling"] == {"logprobs": 2, "n": 3, "seed": 5, "stop": ["a", "b"], "top_k": 4}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (batch("/v1/embeddings", {}), "/v1/embeddings"),
        (batch(CHAT_URL, {"messages": USER}, method="GET"), "GET"),
        (batch(CHAT_URL, [1]), "not a JSON object"),
        (batch(CHAT_URL, {"prompt": "x"}), "messages"),
        (batch(COMPLETIONS_URL, {"messages": USER}), "prompt"),
        (batch(CHAT_URL, {"messages": USER, "temperature": 9}), "temperature"),
        (batch(CHAT_URL, {"messages": USER, "tools": [{}]}), "tools"),
        (batch(CHAT_URL, {"messages": USER, "chat_template_kwargs": "x"}), "chat_template_kwargs"),
        (batch(CHAT_URL, {"messages": USER, "chat_template_kwargs": []}), "chat_template_kwargs"),
        (batch(COMPLETIONS_URL, {"prompt": "x", "seed": 1 << 63}), "seed"),
        (batch(CHAT_URL, {"messages": USER, "response_format": {"type": "xml"}}), "xml"),
    ],
)
def test_bad_lines_of_a_batch(tmp_path: Path, line: str, error: str) -> None:
    (found,) = lines(tmp_path, line)
    assert error in found.request["error"]
    assert found.url is not None


def test_count(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text("a\nb\nc\n")
    assert count(["x", f"@{file}", "@@y", "@/absent"]) == 5
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert count([f"@{fifo}"]) == 0
