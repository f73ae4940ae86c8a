"""Prompts as people have them: arguments, text lines, JSON lines, OpenAI batch files. Read line by line, none kept.

A line that makes no sense is a request with an `error`; the lines after it go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool.errors import InputError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FORMATS = ("auto", "text", "jsonl")
CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Line:
    """One prompt as it came.

    Attributes:
        fields: what the answer repeats: `prompt`, or all that a JSON line has.
        request: what `qtool.runtimes.stream` wants, but for the index: prompt or messages, or error.
        url: the endpoint of a line of an OpenAI batch file, whose answer has that API's shape; else None.
        size: bytes of the line, of whose fields any may be the large one; 0 for what came as an argument.
    """

    fields: dict[str, Any]
    request: dict[str, Any]
    url: str | None = None
    size: int = 0


@dataclass(frozen=True)
class Chat:
    """How prompts become conversations; `messages` are conversations anyway.

    Args:
        every: plain prompts too, as what the user says.
        system: what the system says first, where it says nothing yet.
    """

    every: bool = False
    system: str | None = None

    def request(self, prompt: Any) -> dict[str, Any]:
        if not self.every or not isinstance(prompt, str):
            return {"prompt": prompt}
        return self.conversation([{"role": "user", "content": prompt}])

    def conversation(self, messages: list[Any]) -> dict[str, Any]:
        first = messages[0] if messages else None
        if self.system is None or (isinstance(first, Mapping) and first.get("role") == "system"):
            return {"messages": messages}
        return {"messages": [{"role": "system", "content": self.system}, *messages]}


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
            if os.path.samestat(file, os.fstat(0) if name == "-" else Path(name).expanduser().stat()):
                return True
    return False


def _newlines(name: str) -> int:
    try:
        descriptor = os.dup(0) if name == "-" else os.open(Path(name).expanduser(), os.O_RDONLY | os.O_NONBLOCK)
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
        descriptor = 0 if name == "-" else os.open(Path(name).expanduser(), os.O_RDONLY)
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
        return _bad(text, "the line is no JSON object")
    if "custom_id" in fields and "body" in fields:
        return _batch(fields, chat)
    if "messages" in fields:
        messages = fields["messages"]
        return Line(fields, chat.conversation(messages) if _is_conversation(messages) else {"error": _NO_MESSAGES})
    if "prompt" in fields:
        return Line(fields, chat.request(fields["prompt"]) if _is_prompt(fields["prompt"]) else {"error": _NO_PROMPT})
    return Line(fields, {"error": "the line has neither prompt nor messages"})


_NO_MESSAGES = "messages is no list of objects with role and content"
_NO_PROMPT = "prompt is no text, and no list of token ids"


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    return isinstance(prompt, str)


# ---------------------------------------------------------------- OpenAI's batch files


def _batch(fields: dict[str, Any], chat: Chat) -> Line:
    """A line of a batch file: custom_id, method, url, body. What the body says of sampling is this line's own."""
    url, body = fields.get("url"), fields["body"]
    try:
        if fields.get("method", "POST") != "POST" or url not in (CHAT_URL, COMPLETIONS_URL):
            raise InputError(f"{fields.get('method')} {url} is not POST {CHAT_URL} or {COMPLETIONS_URL}")
        if not isinstance(body, dict):
            raise InputError("body is no JSON object")
        request = _body(body, url, chat)
    except InputError as error:
        request = {"error": error.what}
    return Line(fields, request, url if url in (CHAT_URL, COMPLETIONS_URL) else CHAT_URL)


def _body(body: Mapping[str, Any], url: str, chat: Chat) -> dict[str, Any]:
    if url == CHAT_URL:
        if not _is_conversation(body.get("messages")):
            raise InputError(_NO_MESSAGES)
        request = chat.conversation(body["messages"])
    else:
        if not _is_prompt(body.get("prompt")):
            raise InputError(_NO_PROMPT)
        request = {"prompt": body["prompt"]}
    if body.get("tools"):
        raise InputError("tools are not supported")
    if (extra := body.get("chat_template_kwargs")) is not None:
        if not isinstance(extra, dict):
            raise InputError("chat_template_kwargs is no JSON object")
        request["chat_template_kwargs"] = extra
    return request | {"sampling": _sampling(body, url)}


def _sampling(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """What a request body says of sampling, by vLLM's names; keys that say nothing of it are left alone."""
    from qtool.recipe.schema import Sampling
    from qtool.runtimes.sampling import validated

    given = {name: body[name] for name in Sampling.model_fields if body.get(name) is not None}
    if (most := body.get("max_completion_tokens")) is not None:
        given["max_tokens"] = most
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if url == CHAT_URL and "logprobs" in given:
        given["logprobs"] = body.get("top_logprobs", 0) if given["logprobs"] is True else None
    given |= _structure(body.get("response_format"))
    return validated({name: value for name, value in given.items() if value is not None})


def _structure(wanted: Any) -> dict[str, Any]:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"structured_outputs": {"json_object": True}}
    if kind == "json_schema" and isinstance(schema := wanted.get("json_schema"), dict) and "schema" in schema:
        return {"structured_outputs": {"json": schema["schema"]}}
    raise InputError(f"response_format {str(wanted)[:100]} is not supported")
