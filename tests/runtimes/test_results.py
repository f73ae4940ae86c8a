"""The shapes of answers, and the file that can be continued."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError
from qtool.files import encode_json
from qtool.runtimes.answers import Answers
from qtool.runtimes.batch import CHAT_URL, COMPLETIONS_URL
from qtool.runtimes.identity import decisive, fingerprint
from qtool.runtimes.lines import Line
from qtool.runtimes.results import belongs, record

PLACES = [
    {"token": "a", "token_id": 5, "logprob": -0.5, "top_logprobs": [{"token": "a", "token_id": 5, "logprob": -0.5}]},
    {"token": "bc", "token_id": 6, "logprob": -1.5, "top_logprobs": [{"token": "d", "token_id": 7, "logprob": -0.1}]},
]


def item(**changed: Any) -> dict[str, Any]:
    choice = {"text": "abc", "finish_reason": "stop", "completion_tokens": 2}
    return {"index": 3, "prompt_tokens": 4, "choices": [choice | changed]}


def line(**fields: Any) -> Line:
    return Line(fields, {"prompt": fields.get("prompt")})


def test_a_lines_fields_come_before_the_answer() -> None:
    found = record(line(id=7, prompt="x"), item(logprobs=PLACES))
    assert list(found) == [
        "id", "prompt", "text", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs",
    ]  # fmt: skip
    assert (found["id"], found["text"], found["completion_tokens"]) == (7, "abc", 2)
    failed = record(line(id=7, prompt="x"), {"index": 3, "error": "no"})
    assert failed == {"id": 7, "prompt": "x", "error": "no"}


def test_fields_that_are_named_like_the_answers_are_kept() -> None:
    asked = line(prompt="x", text="mine", finish_reason=1, input="i")
    found = record(asked, item())
    assert (found["text"], found["finish_reason"], found["prompt"]) == ("abc", "stop", "x")
    assert found["input"] == {"text": "mine", "finish_reason": 1, "input": "i"}
    assert belongs(asked, found)
    assert not belongs(line(prompt="x", text="yours", finish_reason=1, input="i"), found)


@pytest.mark.parametrize(
    "fields",
    [
        {"error": "of then", "text": "t", "choices": [], "reasoning": None, "logprobs": 1},
        {"id": float("nan"), "score": [float("inf"), -0.0]},
        {"input": {"prompt": "mine", "text": "t"}},
        {"input": 3, "error": None},
        {"half": "\ud83d", "flag": True},
    ],
)
@pytest.mark.parametrize("outcome", [item(), {"index": 3, "error": "no"}])
def test_a_lines_own_fields_are_no_part_of_the_answer(fields: dict[str, Any], outcome: dict[str, Any]) -> None:
    """What is left of the line comes out again, under `input` where an answer might say it; and is known again."""
    asked = line(prompt="x", **fields)
    found = json.loads(encode_json(record(asked, outcome)))
    assert ("error" in found, "text" in found) == ("error" in outcome, "error" not in outcome)
    kept = found["input"] if {"error", "text"} & fields.keys() else found
    assert all(repr(kept[name]) == repr(value) for name, value in fields.items())
    assert belongs(asked, found)
    assert not belongs(line(prompt="x", **fields | {"flag": 1}), found)
    assert not belongs(line(prompt="x"), found)


def test_several_answers() -> None:
    several = item()
    several["choices"] *= 2
    found = record(line(prompt="x"), several)
    assert list(found) == ["prompt", "choices", "prompt_tokens", "completion_tokens"]
    assert (found["completion_tokens"], len(found["choices"])) == (4, 2)


def test_openais_shapes_are_read_by_openais_client() -> None:
    types = pytest.importorskip("openai.types")
    chat_types = pytest.importorskip("openai.types.chat")
    fields = {"custom_id": "c1", "body": {"model": "m"}}
    chat = record(Line(fields, {}, CHAT_URL), item(logprobs=PLACES, reasoning="hm"))
    plain = record(Line(fields, {}, COMPLETIONS_URL), item(logprobs=PLACES))
    for found in (chat, plain):
        assert set(found) == {"id", "custom_id", "response", "error"}
        assert (found["custom_id"], found["response"]["status_code"], found["error"]) == ("c1", 200, None)
    completion = chat_types.ChatCompletion.model_validate(chat["response"]["body"], strict=True)
    assert completion.choices[0].message.content == "abc"
    assert completion.choices[0].logprobs.content[1].logprob == -1.5
    assert (completion.usage.prompt_tokens, completion.usage.total_tokens) == (4, 6)
    assert chat["response"]["body"]["choices"][0]["message"]["reasoning"] == "hm"
    text = types.Completion.model_validate(plain["response"]["body"], strict=True)
    assert text.choices[0].text == "abc"
    assert text.choices[0].logprobs.text_offset == [0, 1]
    assert text.choices[0].logprobs.top_logprobs == [{"a": -0.5}, {"d": -0.1}]
    failed = record(Line(fields, {}, CHAT_URL), {"index": 0, "error": "too long"})
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["message"] == failed["error"]["message"] == "too long"
    assert belongs(Line(fields, {}, CHAT_URL), failed)


def test_any_text_makes_one_line() -> None:
    for text in ("é\u2028\n\x00", "\ud800 half"):
        encoded = encode_json({"text": text})
        assert encoded.count(b"\n") == 1
        assert json.loads(encoded) == {"text": text}


def test_models_are_told_apart(tiny_llama: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Other weights of the same shapes, and whatever else decides about an answer."""
    known = {fingerprint(tiny_llama), fingerprint(make_model("llama", seed=1))}
    assert len(known) == 2
    assert fingerprint(tiny_llama) in known
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    assert fingerprint(model) in known
    (model / "README.md").write_text("x")
    assert fingerprint(model) in known
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept + b"\n")
        assert fingerprint(model) not in known
        (model / name).write_bytes(kept)
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert fingerprint(model) not in known


# ---------------------------------------------------------------- the file

SETTINGS = {"sampling": {"temperature": 0.0, "logit_bias": {5: 1.0}}}


def prompts(count: int) -> list[Line]:
    return [line(prompt=f"p{i}") for i in range(count)]


def write(file: Path, count: int, total: int, **options: Any) -> int:
    """Answer `count` of `total` prompts and stop as if killed; returns how many were there already."""
    with Answers(file, SETTINGS, **options) as answers:
        lines = iter(prompts(total))
        there = answers.skip(lines)
        left = list(lines)
        if left:
            answers.begin()
        for asked in left[:count]:
            answers.write(record(asked, item()))
        if count >= len(left):
            answers.finish()
        return there


def content(file: Path) -> list[str]:
    return [json.loads(text)["prompt"] for text in file.read_text().splitlines()]


def test_a_job_is_continued_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert write(file, 3, 10) == 0
    assert write(file, 4, 10, resume=True) == 3
    assert write(file, 99, 10, resume=True) == 7
    assert content(file) == [f"p{i}" for i in range(10)]
    assert list(tmp_path.iterdir()) == [file]
    assert write(file, 99, 10, resume=True) == 10  # nothing left to do
    with pytest.raises(InputError, match="its settings are no longer known"):
        write(file, 99, 11, resume=True)


def test_a_torn_line_is_answered_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    write(file, 3, 10)
    whole = file.read_bytes()
    second = whole.index(b"\n") + 1
    for end in (*range(second, second + 30), len(whole) - 1):
        file.write_bytes(whole[:end])
        (tmp_path / ".answers.jsonl.qtool.json").write_text(json.dumps(SETTINGS))
        there = write(file, 99, 10, resume=True)
        assert there == whole[:end].count(b"\n")
        assert content(file) == [f"p{i}" for i in range(10)]


def test_a_torn_line_may_be_long(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    write(file, 1, 3)
    with file.open("ab") as more:
        more.write(b'{"prompt": "p1", "text": "' + b"x" * 200_000)
    assert write(file, 99, 3, resume=True) == 1
    assert content(file) == ["p0", "p1", "p2"]


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    write(file, 3, 10)
    before = file.read_bytes()
    with pytest.raises(InputError, match="already has answers"):
        write(file, 3, 10)
    with pytest.raises(InputError, match="more answers than there are prompts"):
        write(file, 3, 2, resume=True)
    with Answers(file, SETTINGS, resume=True) as answers, pytest.raises(InputError, match="not an answer to prompt 1"):
        answers.skip(iter([line(prompt="other")]))
    other = {"sampling": {"temperature": 0.7}}
    with Answers(file, other, resume=True) as answers, pytest.raises(InputError, match="another sampling"):
        answers.skip(iter(prompts(10)))
    assert file.read_bytes() == before
    file.write_bytes(before + b"garbage\n")
    with pytest.raises(InputError, match="not an answer to prompt 4"):
        write(file, 3, 10, resume=True)
    assert write(file, 2, 10, overwrite=True) == 0
    assert content(file) == ["p0", "p1"]


def test_only_what_decides_about_answers_must_stay() -> None:
    given = {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 30, "OMP_NUM_THREADS": "4", "dtype": "float32", "seed": 3}
    assert decisive(given) == {"dtype": "float32", "seed": 3}


def test_an_empty_file_has_no_answers_in_it(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.touch()
    assert write(file, 2, 3) == 0
    assert content(file) == ["p0", "p1"]


def test_only_one_writes(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file, SETTINGS), pytest.raises(InputError, match="another process"):
        write(file, 1, 1, resume=True)


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):

        def flock(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        assert write(tmp_path / f"{number}.jsonl", 1, 1) == 0


def test_failed_answers_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file, SETTINGS) as answers:
        answers.skip(iter(()))
        answers.begin()
        answers.write(record(line(prompt="p0"), {"index": 0, "error": "no"}))
        answers.write(record(line(prompt="p1"), item()))
        answers.write(record(line(prompt="p2", error="of then"), item()))
    with Answers(file, SETTINGS, resume=True) as answers:
        assert answers.skip(iter([*prompts(2), line(prompt="p2", error="of then"), line(prompt="p3")])) == 3
        assert answers.errors == 1
    with pytest.raises(InputError, match="can't be written"):
        Answers(tmp_path / "absent" / "file", SETTINGS)
