"""Calibration text against the tokenizer, json, pyarrow and hashlib themselves."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from qtool.calibration.text import held_out, load, passages
from qtool.errors import InputError

TEXTS = ["The first document.", "And then: a second one, with ünïcödé.", "Third."]
MESSAGES = [
    [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A mutable sequence."}],
    [{"role": "user", "content": "And a tuple?"}, {"role": "assistant", "content": "An immutable one."}],
]


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return str(path)


def joined(tokenizer: Any, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


@pytest.fixture(scope="module")
def long_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def test_a_txt_is_cut_from_its_start_in_order(tmp_path: Path, tiny_tokenizer: Any, long_text: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(long_text, encoding="utf-8")
    whole = tiny_tokenizer(long_text)["input_ids"]  # more than is ever tokenized for four samples
    result = load(str(path), tiny_tokenizer, samples=4, seq_len=64, seed=3)
    assert result.ids.tolist() == [whole[i * 64 : (i + 1) * 64] for i in range(4)]
    assert str(result.ids.dtype) == "torch.int64"
    assert result.digest == hashlib.sha256(np.array(whole[:256], dtype="<i8").tobytes()).hexdigest()
    assert result.source == "text.txt"


def test_all_of_a_txt_can_be_used(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = "Grüße, naïve café 😀. " * 200
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    whole = tiny_tokenizer(text)["input_ids"]
    result = load(str(path), tiny_tokenizer, samples=1, seq_len=len(whole), seed=0)
    assert result.ids[0].tolist() == whole


@pytest.mark.parametrize("cut", range(4))
def test_a_character_at_the_cut_is_no_error(tmp_path: Path, tiny_tokenizer: Any, cut: int) -> None:
    text = "x" * cut + "😀 " * 20_000
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    result = load(str(path), tiny_tokenizer, samples=2, seq_len=16, seed=0)
    assert result.ids.flatten().tolist() == tiny_tokenizer(text)["input_ids"][:32]


def test_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n" * 1)
    tokens = tiny_tokenizer("one\ntwo\nthree\n")["input_ids"]
    result = load(str(path), tiny_tokenizer, samples=1, seq_len=len(tokens), seed=0)
    assert result.ids[0].tolist() == tokens


def test_jsonl_joins_documents_by_the_end_token(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": text, "id": 1} for text in TEXTS])
    expected = joined(tiny_tokenizer, TEXTS)
    result = load(path, tiny_tokenizer, samples=1, seq_len=len(expected), seed=0)
    assert result.ids[0].tolist() == expected


def test_messages_go_through_the_chat_template(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"messages": messages} for messages in MESSAGES])
    texts = [
        "<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\nA mutable sequence.<|im_end|>\n",
        "<|im_start|>user\nAnd a tuple?<|im_end|>\n<|im_start|>assistant\nAn immutable one.<|im_end|>\n",
    ]
    expected = joined(tiny_tokenizer, texts)
    result = load(path, tiny_tokenizer, samples=1, seq_len=len(expected), seed=0)
    assert result.ids[0].tolist() == expected
    assert expected[0] == tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize("columns", [{"text": TEXTS, "n": [1, 2, 3]}, {"messages": MESSAGES}])
def test_parquet_is_the_same_as_jsonl(tmp_path: Path, tiny_tokenizer: Any, columns: dict[str, list[Any]]) -> None:
    first = next(iter(columns))
    lines = jsonl(tmp_path / "x.jsonl", [{first: value} for value in columns[first]])
    table = parquet(tmp_path / "x.parquet", columns)
    kwargs: dict[str, Any] = {"samples": 2, "seq_len": 9, "seed": 0}
    assert load(table, tiny_tokenizer, **kwargs).digest == load(lines, tiny_tokenizer, **kwargs).digest


def test_parquet_rows_lack_what_their_jsonl_lines_lack(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Arrow gives every struct of a column all keys, and every row all columns."""
    import copy

    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'tool_calls' in message %}{% if message.tool_calls | length != 1 %}"
        "{{ raise_exception('single tool calls only') }}{% endif %}{{ message.tool_calls[0] | tojson }}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    other = {"function": {"name": "time", "arguments": {"zone": "CET"}}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "Late?"}, {"role": "assistant", "tool_calls": [other]}]},
        {"text": "A document between conversations."},
        {"messages": MESSAGES[0], "text": None},
    ]
    lines = jsonl(tmp_path / "x.jsonl", rows)
    pq.write_table(
        pa.Table.from_pylist([{"text": None, "messages": None} | row for row in rows]), tmp_path / "x.parquet"
    )
    expected = load(lines, tokenizer, samples=1, seq_len=120, seed=0).ids.tolist()
    assert load(str(tmp_path / "x.parquet"), tokenizer, samples=1, seq_len=120, seed=0).ids.tolist() == expected
    text = tokenizer.decode(expected[0])
    assert "Paris" in text
    assert "between conversations" in text


def test_builtin_is_deterministic_and_the_seed_orders_it(tiny_tokenizer: Any) -> None:
    first = load("builtin", tiny_tokenizer, samples=8, seq_len=128, seed=0)
    assert first.digest == load("builtin", tiny_tokenizer, samples=8, seq_len=128, seed=0).digest
    assert first.digest != load("builtin", tiny_tokenizer, samples=8, seq_len=128, seed=1).digest
    assert tuple(first.ids.shape) == (8, 128)
    shorter = load("builtin", tiny_tokenizer, samples=4, seq_len=128, seed=0)
    assert shorter.ids.tolist() == first.ids[:4].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_builtin_text_is_passages(tiny_tokenizer: Any, seed: int) -> None:
    """Whatever the order: no long topic comes before them."""
    text = tiny_tokenizer.decode(load("builtin", tiny_tokenizer, samples=32, seq_len=256, seed=seed).ids.flatten())
    shipped = [line for passage in passages().values() for line in passage.splitlines() if len(line) > 20]
    share = sum(len(line.encode()) for line in shipped if line in text) / len(text.encode())
    assert 0.35 < share < 0.6


def test_held_out_text_is_in_no_calibration_text(tiny_tokenizer: Any) -> None:
    def text(calibration: Any) -> str:
        return tiny_tokenizer.decode(calibration.ids.flatten())

    def everything(samples: int) -> str:
        with pytest.raises(InputError) as caught:
            load("builtin", tiny_tokenizer, samples=10**6, seq_len=1, seed=0)
        found = re.search(r"([\d,]+) tokens", caught.value.what)
        assert found
        return text(load("builtin", tiny_tokenizer, samples=samples, seq_len=int(found[1].replace(",", "")), seed=0))

    calibration = {" ".join(p.split()) for p in everything(1).split("\n\n")}
    evaluation = {" ".join(p.split()) for p in text(held_out(tiny_tokenizer, samples=40, seq_len=512)).split("\n\n")}
    assert len(calibration) > 1000
    assert len(evaluation) > 100
    assert not calibration & evaluation


def test_too_little_text_says_how_much_is_missing(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 100, encoding="utf-8")
    count = len(tiny_tokenizer("word " * 100)["input_ids"])
    with pytest.raises(InputError) as caught:
        load(str(path), tiny_tokenizer, samples=32, seq_len=50, seed=0)
    assert f"{count} tokens" in caught.value.what
    assert "32 samples of 50 need 1,600" in caught.value.what
    assert f"{1600 - count:,} are missing" in caught.value.what
    assert f"--samples {count // 50}" in (caught.value.hint or "")
    with pytest.raises(InputError) as caught:
        load(str(path), tiny_tokenizer, samples=1, seq_len=5000, seed=0)
    assert "--seq-len" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\n", "empty"),
        ("a.txt", b"text\0text", "binary"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text: byte 3 is 0xe9"),
        ("a.txt", b"cut off \xf0\x9f", "not UTF-8"),
        ("a.csv", b"a,b", "unknown kind"),
        ("a", b"text", "unknown kind"),
        ("a.jsonl", b"", "0 tokens"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', ":3: each line must be a JSON object"),
        ("a.jsonl", b'{"text": 3}', ":1: `text` must be a string, not int"),
        ("a.jsonl", b'{"content": "a"}', ":1: neither `text` nor `messages`"),
        ("a.jsonl", b'{"messages": "a"}', ":1: `messages` must be a list"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', ":1: `messages` must be a list"),
        ("a.jsonl", b'{"messages": []}', ":1: `messages` is empty"),
        ("a.jsonl", b'{"text": "\xff"}', ":1: not UTF-8"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "cut \\ud83d off"}', r":2: .* an unpaired surrogate: U\+D83D"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\udc00"}]}', r":1: .*unpaired surrogate: U\+DC00"),
        ("a.jsonl", b"\x1f\x8b\x08\0\0\0", ":1: this is a binary file"),
        ("a.parquet", b"", "not a valid parquet file"),
        ("a.parquet", b"PAR1 nonsense PAR1", "not a valid parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, tiny_tokenizer: Any, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(str(path), tiny_tokenizer, samples=4, seq_len=16, seed=0)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(path))
    assert "\n" not in str(caught.value)


def test_parquet_without_a_text_column_lists_its_columns(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = parquet(tmp_path / "x.parquet", {"prompt": ["a"], "answer": ["b"]})
    with pytest.raises(InputError, match="no column is named") as caught:
        load(path, tiny_tokenizer, samples=1, seq_len=4, seed=0)
    assert "prompt, answer" in (caught.value.hint or "")
    path = parquet(tmp_path / "y.parquet", {"text": ["a", None]})
    with pytest.raises(InputError, match="row 2"):
        load(path, tiny_tokenizer, samples=1, seq_len=40, seed=0)


def test_missing_file_and_folder(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no such text file"):
        load(str(tmp_path / "no.txt"), tiny_tokenizer, samples=1, seq_len=4, seed=0)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="can't read"):
        load(str(tmp_path / "folder.txt"), tiny_tokenizer, samples=1, seq_len=4, seed=0)


def test_messages_need_a_template_that_takes_them(tmp_path: Path, tiny_tokenizer: Any) -> None:
    import copy

    path = jsonl(tmp_path / "x.jsonl", [{"messages": MESSAGES[0]}])
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=":1: the model's chat template refuses these messages: roles must alternate"):
        load(path, tokenizer, samples=1, seq_len=4, seed=0)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=":1: `messages` needs a chat template"):
        load(path, tokenizer, samples=1, seq_len=4, seed=0)
