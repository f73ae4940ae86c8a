"""Answers as lines: their shapes, and the file in which they gather, so that a long job can be continued."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qtool.errors import InputError, QtoolError
from qtool.files import disk_errors, encode_json, write_json
from qtool.locks import lock
from qtool.runtimes.requests import CHAT_URL, Line

_CHUNK = 1 << 16
_SAMPLES = 16  # of _CHUNK bytes, of each file of weights: from its header to its end
_SMALL = (
    "config.json",
    "generation_config.json",
    "quant*_description.json",
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
)

# of vLLM's EngineArgs those that are about memory, time and devices
RESOURCES = frozenset(
    {
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "num_gpu_blocks_override",
        "block_size",
        "swap_space",
        "cpu_offload_gb",
        "kv_offloading_size",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "async_scheduling",
        "enforce_eager",
        "compilation_config",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "enable_expert_parallel",
        "distributed_executor_backend",
    }
)

# what an answer may say, whether or not it does: no field of the prompt's own goes by these names
ANSWERS_OWN = frozenset(
    {
        "text",
        "finish_reason",
        "choices",
        "prompt_tokens",
        "completion_tokens",
        "reasoning",
        "logprobs",
        "prompt_logprobs",
        "error",
    }
)


def record(line: Line, item: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a line: in the shape of OpenAI's batch output for lines of a batch, else the line's own fields and
    text, finish_reason, prompt_tokens, completion_tokens, or error."""
    if line.url is not None:
        return _batch(line, item)
    return _carried(line.fields) | _answer(item)


def decisive(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of `--set` decides about an answer. What is only about memory, time and devices may change while a job is
    continued, after memory ran out for example."""
    return {name: value for name, value in arguments.items() if not name.isupper() and name not in RESOURCES}


def fingerprint(model: Path) -> str:
    """What tells a checkpoint folder from others, without reading all of it: a hash of the small files that decide
    about an answer, of the weights' names and sizes, and of samples of the weights."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in _SMALL for file in model.glob(pattern) if file.is_file()}):
        found.update(repr(file.name).encode() + file.read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(repr((file.name, size)).encode())
        with file.open("rb", buffering=0) as weights:
            for i in range(_SAMPLES):
                found.update(os.pread(weights.fileno(), _CHUNK, max(0, size - _CHUNK) * i // (_SAMPLES - 1)))
    return found.hexdigest()


def belongs(line: Line, found: Mapping[str, Any]) -> bool:
    """Whether a record is one of this line's."""
    if line.url is not None:
        return "custom_id" in found and _same(found["custom_id"], line.fields["custom_id"])
    return _same(_carried(line.fields), {name: value for name, value in found.items() if name not in ANSWERS_OWN})


def _same(one: Any, other: Any) -> bool:
    """Whether JSON says both alike; unlike ==, which NaN is never to itself, and 1 to true."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _answer(item: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in item:
        return {"error": item["error"]}
    choices = item["choices"]
    several = len(choices) > 1
    first = {name: value for name, value in choices[0].items() if name != "completion_tokens"}
    answer: dict[str, Any] = {"choices": choices} if several else {k: first.pop(k) for k in ("text", "finish_reason")}
    answer["prompt_tokens"] = item["prompt_tokens"]
    answer["completion_tokens"] = sum(choice["completion_tokens"] for choice in choices)
    if "prompt_logprobs" in item:
        answer["prompt_logprobs"] = item["prompt_logprobs"]
    return answer if several else answer | first


def _carried(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The line's fields as they stand beside an answer; those that are named like something of an answer's move into
    `input`, and with them a field of this name."""
    if not fields.keys() & ANSWERS_OWN:
        return dict(fields)
    moved = {name: value for name, value in fields.items() if name in ANSWERS_OWN or name == "input"}
    return {name: value for name, value in fields.items() if name not in moved} | {"input": moved}


# ---------------------------------------------------------------- OpenAI's shapes


def _batch(line: Line, item: Mapping[str, Any]) -> dict[str, Any]:
    number = f"{item['index']:08}"
    if "error" in item:
        error = {"message": item["error"], "type": "invalid_request_error", "param": None, "code": None}
        status, body = 400, {"error": error}
    else:
        status, body = 200, _completion(line, item, number)
    response = {"status_code": status, "request_id": f"req_{number}", "body": body}
    return {
        "id": f"batch_req_{number}",
        "custom_id": line.fields["custom_id"],
        "response": response,
        "error": None if status == 200 else {"code": "invalid_request", "message": item["error"]},
    }


def _completion(line: Line, item: Mapping[str, Any], number: str) -> dict[str, Any]:
    chat = line.url == CHAT_URL
    made = sum(choice["completion_tokens"] for choice in item["choices"])
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": line.fields["body"].get("model", ""),
        "choices": [_choice(i, choice, chat) for i, choice in enumerate(item["choices"])],
        "usage": {
            "prompt_tokens": item["prompt_tokens"],
            "completion_tokens": made,
            "total_tokens": item["prompt_tokens"] + made,
        },
    }


def _choice(index: int, choice: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    places = choice.get("logprobs")
    shown: dict[str, Any] = {"index": index}
    if chat:
        shown["message"] = {"role": "assistant", "content": choice["text"]}
        if choice.get("reasoning") is not None:
            shown["message"]["reasoning"] = choice["reasoning"]
        shown["logprobs"] = None if places is None else {"content": places}
    else:
        shown["text"] = choice["text"]
        shown["logprobs"] = None if places is None else _legacy(places)
    shown["finish_reason"] = choice["finish_reason"]
    return shown


def _legacy(places: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities as completions that are no chat have them."""
    offsets, end = [], 0
    for place in places:
        offsets.append(end)
        end += len(place["token"])
    return {
        "tokens": [place["token"] for place in places],
        "token_logprobs": [place["logprob"] for place in places],
        "top_logprobs": [{top["token"]: top["logprob"] for top in place["top_logprobs"]} for place in places],
        "text_offset": offsets,
    }


# ---------------------------------------------------------------- the file


class Answers:
    """A file that answers are appended to, one line each, in order; `with` closes it.

    While a job is unfinished its settings are in `.NAME.qtool.json` beside it: who continues it must have the same.

    Args:
        settings: what decides how an answer turns out.
        resume: continue the file, if there is one.
        overwrite: begin anew, if there is one.

    Raises:
        InputError: the file is there, and neither resume nor overwrite; it was made with other settings, or it can't be
            told; it can't be written; another process is writing it.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        self._settings = path.with_name(f".{path.name}.qtool.json")
        self._known: Mapping[str, Any] | None = None
        there = path.exists() and path.stat().st_size > 0  # one that never got as far leaves an empty file
        if there and not (resume or overwrite):
            hint = "--resume continues it, --overwrite begins anew."
            raise InputError("there are answers in it already", where=str(path), hint=hint)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"can't be written: {error.strerror}", where=str(path)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            hint = "Without --output the answers go to standard output, a pipe for example."
            raise InputError("this is no regular file, and could not be continued", where=str(path), hint=hint)
        self._file: IO[bytes] = os.fdopen(descriptor, "r+b")
        if not lock(self._file):
            self._file.close()
            raise InputError("another process is writing it", where=str(path))
        if there and resume:
            self._cut_torn_line()
            with contextlib.suppress(FileNotFoundError, ValueError):
                self._known = json.loads(self._settings.read_bytes())
        else:
            self._file.truncate()
        self._now = json.loads(json.dumps(settings))
        self._to_come = True
        self.errors = 0  # of the answers that were there

    def skip(self, lines: Iterator[Line]) -> int:
        """Pass over the lines that are answered; returns how many. To be called before the first `write`.

        Raises:
            InputError: an answer is to another prompt than the one at its place, or made with other settings.
        """
        count = errors = 0
        for found in self._file:
            line = next(lines, None)
            if line is None:
                raise InputError("it has more answers than there are prompts", where=str(self.path), hint=_ANEW)
            count += 1
            try:
                value = json.loads(found)
            except ValueError:
                value = None
            if not isinstance(value, dict) or not belongs(line, value):
                where = f"{self.path}:{count}"
                raise InputError(f"this is no answer to prompt {count}", where=where, hint=_ANEW)
            errors += "error" in value and value["error"] is not None
        self.errors = errors
        if count and self._known is not None and self._known != self._now:
            names = self._known.keys() | self._now.keys()
            changed = sorted(name for name in names if self._known.get(name) != self._now.get(name))
            raise InputError(
                f"its answers were made with another {', '.join(changed)}", where=str(self.path), hint=_ANEW
            )
        self._to_come = not count or self._known is not None
        return count

    def begin(self) -> None:
        """There is more to write.

        Raises:
            InputError: the file is complete as it is, and how it was made is not known any more.
            QtoolError: nothing can be written beside it.
        """
        if not self._to_come:
            what = "it was finished with fewer prompts, and with which settings is not known any more"
            raise InputError(what, where=str(self.path), hint=_ANEW)
        write_json(self._settings, self._now, indent=1, hint=_LATER)
        self._file.seek(0, os.SEEK_END)

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one answer; it is in the file when this returns.

        Raises:
            QtoolError: it could not be written, or not all of it.
        """
        with disk_errors(self.path, hint=_LATER):
            self._file.write(encode_json(value))
            self._file.flush()

    def finish(self) -> None:
        """All prompts are answered."""
        with disk_errors(self._settings, hint=_LATER):
            self._settings.unlink(missing_ok=True)

    def _cut_torn_line(self) -> None:
        """A process that was killed while it wrote leaves half a line."""
        end = self._file.seek(0, os.SEEK_END)
        position = end
        while position:
            start = max(0, position - _CHUNK)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)
        self._file.seek(0)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with disk_errors(self.path, hint=_LATER):
                self._file.close()
        except QtoolError:
            if kind is None:  # else what could not be written has been told already, and would be in the way here
                raise


_LATER = "The same command with --resume goes on where it stopped, once there is room."
_ANEW = "Give the prompts and options of then, or begin anew with --overwrite."
