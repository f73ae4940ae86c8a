"""Text for calibration and evaluation, cut into samples of equal length.

`builtin` is CPython's own documentation (pydoc_data.topics), some 300 kB of English and code that every Python has, and
passages.txt beside this module: stories, conversations, code and sums in a dozen languages, written for qtool.
A .txt file is tokenized whole and cut from its start; the documents of a .jsonl or .parquet file (a `text`, or
`messages` through the tokenizer's chat template) are joined by the end-of-sequence token.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.calibration.sources import BUILTIN, PASSAGES, check
from qtool.calibration.template import render
from qtool.errors import InputError
from qtool.files import expand

if TYPE_CHECKING:
    import torch

_MARGIN = 1024  # tokens; those nearer than this to where a text was cut may differ from the whole text's
_PIECE = 2000  # characters of a topic that stay together


@dataclass(frozen=True)
class Calibration:
    """Samples of text, as token ids.

    Attributes:
        ids: int64 [samples, seq_len].
        digest: SHA-256 of the ids (little-endian int64, row by row), in hex.
        source: where the text comes from, for reports; names a file without its folder.
        inputs: what the model's processor made of each sample, where there are pictures; else none.
    """

    ids: torch.Tensor
    digest: str
    source: str
    inputs: tuple[Mapping[str, torch.Tensor], ...] = ()


def load(data: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> Calibration:
    """The first samples * seq_len tokens of `data`: sample i holds tokens i*seq_len to (i+1)*seq_len - 1.

    Args:
        data: builtin, or the path of a .txt, .jsonl or .parquet file.
        tokenizer: transformers' interface: called with text, apply_chat_template, eos_token_id.
        seed: orders the parts of the built-in text. Files are read in their own order.

    Raises:
        InputError: no such file, not readable as text, or too little text; says how much is missing.
    """
    needed = samples * seq_len
    if data == BUILTIN:
        tokens = _tokenize(_whole(_builtin(seed)), tokenizer, needed, BUILTIN)
        source = f"builtin (qtool's passages and documentation of CPython {platform.python_version()})"
    else:
        check(data)
        path = expand(data)
        suffix = path.suffix.lower()
        if suffix == ".txt":
            tokens = _tokenize(functools.partial(_read_text, path), tokenizer, needed, data)
        else:
            documents = _jsonl(path, tokenizer) if suffix == ".jsonl" else _parquet(path, tokenizer)
            tokens = _join(documents, tokenizer, needed)
        source = path.name
    return _pack(tokens, samples, seq_len, source, where=data)


def held_out(tokenizer: Any, *, samples: int, seq_len: int) -> Calibration:
    """Built-in text for evaluation: topics that `load` never uses, nor any paragraph they share with others.

    Raises:
        InputError: it is shorter than samples * seq_len (there are about 66,000 characters).
    """
    tokens = _tokenize(_whole("\n\n".join(_topics()[1])), tokenizer, samples * seq_len, BUILTIN)
    source = f"builtin, held-out part (documentation of CPython {platform.python_version()})"
    return _pack(tokens, samples, seq_len, source, where=BUILTIN)


def _topics() -> tuple[dict[str, str], list[str]]:
    """Two disjoint parts of the built-in text: topics by name for calibration, and texts for evaluation.

    A paragraph is used once only, and never in both.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    evaluation = names[3::4]
    seen: set[str] = set()

    def fresh(text: str) -> str:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        return "\n\n".join(paragraphs)

    held = [fresh(topics[name]) for name in evaluation]
    rest = {name: fresh(topics[name]) for name in names if name not in set(evaluation)}
    return {name: text for name, text in rest.items() if text}, [text for text in held if text]


def _builtin(seed: int) -> str:
    """Topics and passages in an order of the seed, as many bytes of one kind as of the other until passages run out.

    Bytes, since a tokenizer makes about as many tokens of a byte in one language as in another. Long topics come in
    pieces, with passages between them.
    """
    topics = [piece for topic in _shuffled(_topics()[0], seed) for piece in _pieces(topic)]
    waiting, used = (deque(_shuffled(passages(), seed)), deque(topics)), [0, 0]
    parts: list[str] = []
    while any(waiting):
        kind = min((at for at in (0, 1) if waiting[at]), key=lambda at: used[at])
        parts.append(waiting[kind].popleft())
        used[kind] += len(parts[-1].encode())
    return "\n\n".join(parts)


def _pieces(text: str) -> Iterator[str]:
    """Some paragraphs at a time."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > _PIECE:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def passages() -> dict[str, str]:
    """Short texts of many kinds that ship with qtool, by number."""
    text = PASSAGES.read_text(encoding="utf-8")
    return {str(number): passage.strip() for number, passage in enumerate(text.split("\n%%\n"))}


def _shuffled(texts: dict[str, str], seed: int) -> list[str]:
    return [texts[key] for key in sorted(texts, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())]


def _decode(data: bytes, where: str, *, complete: bool = True) -> str:
    """UTF-8 to text; unless `complete`, a character cut off at the end is left out."""
    if b"\0" in data:
        raise InputError("this is a binary file, not text", where=where)
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=complete)
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8, for example with: iconv -f latin1 -t utf-8"
        what = f"not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        raise InputError(what, where=where, hint=hint) from None
    if not complete:
        text = text.removesuffix("\r")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_text(path: Path, length: int) -> tuple[str, bool]:
    """The first `length` bytes of a file as text, and whether that is all of it."""
    with path.open("rb") as file:
        data = file.read(length)
        complete = not file.read(1)
    text = _decode(data, str(path), complete=complete)
    if complete and not text.strip():
        raise InputError("the text file is empty", where=str(path))
    return text, complete


def _tokenize(read: Callable[[int], tuple[str, bool]], tokenizer: Any, needed: int, where: str) -> list[int]:
    """The first `needed` of tokenizer(text)["input_ids"], or all if there are fewer.

    Tokenizing a megabyte takes 300 MB, so no more of the text is tokenized than it takes: `read(length)`
    gives about its first `length` characters, and whether these are all.
    """
    length = 8 * (needed + _MARGIN)
    while True:
        text, complete = read(length)
        tokens = _ids(text, tokenizer, where)
        if complete or len(tokens) >= needed + _MARGIN:
            return tokens[:needed]
        length *= 2


def _whole(text: str) -> Callable[[int], tuple[str, bool]]:
    return lambda length: (text[:length], length >= len(text))


def _ids(text: str, tokenizer: Any, where: str, **options: Any) -> list[int]:
    """The only way to the tokenizer. `where` the text comes from is for errors."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"the text has an unpaired surrogate: U+{ord(text[error.start]):04X}"
        hint = "JSON allows that, but UTF-8 and tokenizers don't: complete the character or remove it"
        raise InputError(what, where=where, hint=hint) from None
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def _join(documents: Iterator[list[int]], tokenizer: Any, needed: int) -> list[int]:
    """Documents one after the other, each closed by the end-of-sequence token if there is one."""
    eos = tokenizer.eos_token_id
    tokens: list[int] = []
    for document in documents:
        tokens += document
        if eos is not None and document and document[-1] != eos:
            tokens.append(eos)
        if len(tokens) >= needed:
            break
    return tokens


def _jsonl(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    return (_document(record, tokenizer, where) for record, where in records(path))


def records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(each line's object, where it is for messages) of a .jsonl file. Raises InputError for a line of another kind."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_decode(line, where))
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"not valid JSON: {error}", where=where) from None
            if not isinstance(record, dict):
                raise InputError("each line must be a JSON object with `text` or `messages`", where=where)
            yield record, where


def _parquet(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        hint = "pip install pyarrow, or use a .jsonl file"
        raise InputError("reading .parquet needs pyarrow", where=str(path), hint=hint) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            if not columns:
                found = ", ".join(file.schema_arrow.names)
                raise InputError("no column is named `text` or `messages`", where=str(path), hint=f"columns: {found}")
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield _document(_said(record), tokenizer, f"{path}: row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"not a valid parquet file: {' '.join(str(error).split())[:200]}", where=str(path)) from None


def _said(value: Any) -> Any:
    """A value from Arrow with the keys that its row was written with.

    A struct in Arrow has every key that any row has, None where a row lacks it. Templates ask whether a key is there.
    """
    if isinstance(value, dict):
        return {key: _said(part) for key, part in value.items() if part is not None}
    return [_said(part) for part in value] if isinstance(value, list) else value


def _document(record: dict[str, Any], tokenizer: Any, where: str) -> list[int]:
    """The token ids of one record: its `text`, or its `messages` as the chat template writes them."""
    if record.get("text") is not None:
        if not isinstance(record["text"], str):
            raise InputError(f"`text` must be a string, not {type(record['text']).__name__}", where=where)
        return _ids(record["text"], tokenizer, where)
    messages = record.get("messages")
    if messages is None:
        found = ", ".join(list(record)[:8]) or "nothing"
        raise InputError("neither `text` nor `messages`", where=where, hint=f"found: {found}")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise InputError("`messages` must be a list of {role, content}", where=where)
    if not messages:
        raise InputError("`messages` is empty", where=where)
    if next(picture_parts(record), None) is not None:
        what = "its messages have pictures, which only `qtool quantize` with the native engine shows to the model"
        raise InputError(what, where=where, hint="use a text without pictures here")
    if not getattr(tokenizer, "chat_template", None):
        hint = "use `text`, or an instruction-tuned model"
        raise InputError(
            "`messages` needs a chat template, and this model's tokenizer has none", where=where, hint=hint
        )
    text = render(tokenizer, messages, "these messages", where)
    return _ids(text, tokenizer, where, add_special_tokens=False)


def picture_parts(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a record's messages that are pictures."""
    messages = record.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and str(part.get("type", "")).startswith("image"):
                yield part


def _pack(tokens: list[int], samples: int, seq_len: int, source: str, where: str) -> Calibration:
    import torch

    needed = samples * seq_len
    if len(tokens) < needed:
        fitting = len(tokens) // seq_len
        hint = (
            f"give more text, or use --samples {fitting}" if fitting else "give more text, or use a smaller --seq-len"
        )
        raise InputError(
            f"too little text: {len(tokens):,} tokens, but {samples} samples of {seq_len} need {needed:,}: "
            f"{needed - len(tokens):,} are missing",
            where=where,
            hint=hint,
        )
    ids = torch.tensor(tokens[:needed], dtype=torch.int64).reshape(samples, seq_len)
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    return Calibration(ids, digest, source)
