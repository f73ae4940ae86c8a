"""Prompts as people have them: arguments, text lines, JSON lines, OpenAI batch files. Read line by line, none kept.

A line that makes no sense is a request with an `error`; the lines after it go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace

from qtool.errors import InputError
from qtool.files import expand
from qtool.runtimes import batch
from qtool.runtimes.lines import NO_MESSAGES, NO_PROMPT, Chat, Line, is_conversation, is_prompt

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FORMATS = ("auto", "text", "jsonl")
_CHUNK = 1 << 16


def read(prompts: Iterable[str], chat: Chat, format: str = "auto") -> Iterator[Line]:
    """The prompts of the command line: texts, and with an @ before it the lines of a file (`@-`: standard input).

    A prompt that begins with @ is written with two.

    Raises:
        InputError: a file that can't be read.
    """
    for prompt in prompts:
        if prompt.startswith("@@"):
            yield _plain(prompt[1:], chat)
        elif prompt.startswith("@"):
            yield from _file(prompt[1:], chat, format)
        else:
            yield _plain(prompt, chat)


def count(prompts: Iterable[str]) -> int:
    """How many prompts `read` will find, nearly; regular files are counted by their lines, others not at all."""
    return sum(_newlines(p[1:]) if p.startswith("@") and not p.startswith("@@") else 1 for p in prompts)


def reads(prompts: Iterable[str], file: os.stat_result) -> bool:
    """Whether this is one of the files that `read` would read; a terminal, a pipe or the like never is."""
    if not stat.S_ISREG(file.st_mode):
        return False
    names = [prompt[1:] for prompt in prompts if prompt.startswith("@") and not prompt.startswith("@@")]
    for name in names:
        with contextlib.suppress(OSError):  # reading it will say so
            if os.path.samestat(file, os.fstat(0) if name == "-" else expand(name).stat()):
                return True
    return False


def _newlines(name: str) -> int:
    try:
        descriptor = os.dup(0) if name == "-" else os.open(expand(name), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # reading it will say so
        return 0
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        total = position = 0
        while data := os.pread(descriptor, _CHUNK, position):
            total += data.count(b"\n")
            position += len(data)
        return total
    finally:
        os.close(descriptor)


def _file(name: str, chat: Chat, format: str) -> Iterator[Line]:
    try:
        descriptor = 0 if name == "-" else os.open(expand(name), os.O_RDONLY)
        try:
            yield from _parsed(_lines(descriptor), name, chat, format)
        finally:
            if descriptor:
                os.close(descriptor)
    except OSError as error:
        raise InputError(f"can't read the prompts: {error.strerror}", where=name) from None


def _lines(descriptor: int) -> Iterator[bytes]:
    """Lines without their ends. Not of a buffered file: at exit, a thread that waits for input would hold its lock."""
    rest: list[bytes] = []
    while data := os.read(descriptor, _CHUNK):
        *lines, tail = data.split(b"\n")
        if lines:
            yield b"".join([*rest, lines[0]])
            yield from lines[1:]
            rest = []
        rest.append(tail)
    yield b"".join(rest)


def _parsed(lines: Iterator[bytes], name: str, chat: Chat, format: str) -> Iterator[Line]:
    as_json = True if format == "jsonl" or (format == "auto" and name.endswith(JSON_SUFFIXES)) else None
    if format == "text":
        as_json = False
    for number, line in enumerate(lines):
        line = (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).rstrip(b"\r")
        if not line.strip():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            bad = _bad(line.decode(errors="backslashreplace"), f"byte {error.start} of the line is not UTF-8")
            yield replace(bad, size=len(line))
            continue
        if as_json is None:  # the first line says what all are
            as_json = _is_object(text)
        yield replace(_json(text, chat) if as_json else _plain(text, chat), size=len(line))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _plain(prompt: str, chat: Chat) -> Line:
    return Line({"prompt": prompt}, chat.request(prompt))


def _bad(text: str, error: str) -> Line:
    return Line({"prompt": text}, {"error": error})


def _json(text: str, chat: Chat) -> Line:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _bad(text, f"the line is not JSON: {error}")
    if not isinstance(fields, dict):
        return _bad(text, "the line is not a JSON object")
    if "custom_id" in fields and "body" in fields:
        return batch.line(fields, chat)
    if "messages" in fields:
        messages = fields["messages"]
        return Line(fields, chat.conversation(messages) if is_conversation(messages) else {"error": NO_MESSAGES})
    if "prompt" in fields:
        return Line(fields, chat.request(fields["prompt"]) if is_prompt(fields["prompt"]) else {"error": NO_PROMPT})
    return Line(fields, {"error": "the line has neither prompt nor messages"})
