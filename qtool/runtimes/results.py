"""Answers as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qtool.runtimes import batch
from qtool.runtimes.lines import Line

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
        return batch.record(line, item)
    return _carried(line.fields) | _answer(item)


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
