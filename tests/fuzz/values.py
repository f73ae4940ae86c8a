"""What a stranger may have put where a value should be: strategies for JSON, bytes and their mutations."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 2, 255, 10**6, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, -(10**9)]
FLOATS = [0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    " ",
    "x",
    "\0",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "../x",
    "/etc/passwd",
    "~",
    "a" * 5000,
    "é\u0301",
    "None",
    "1",
    "re:",
    "re:(",
    "re:(a+)+$",
    "{{",
    "%s%n",
    "int8",
    "float",
    "null",
    "W8A8",
    "model.layers.0",
    "\r\n",
    "torch.float32",
    "llama",
    "gpt2",
    "auto",
]

evil = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-(2**70), 2**70),
    st.sampled_from(FLOATS),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
    st.just([[]]),
    st.just([None]),
    st.just({"": None}),
    st.lists(st.sampled_from([*NUMBERS, *TEXTS, None]), max_size=4),
    st.dictionaries(st.sampled_from(TEXTS), st.sampled_from([*NUMBERS, *TEXTS, None]), max_size=3),
    st.integers(1, 50).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value but its root; of long lists and objects only the first few."""
    found = []
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())[:60]
    else:
        items = list(enumerate(value[:8])) if isinstance(value, list) else []
    for key, part in items:
        found += [(*path, key), *_places(part, (*path, key))]
    return found


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A JSON value with up to `most` of its parts replaced, removed, renamed or taken from elsewhere in it."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = _places(value)
        if not places:
            return copy.deepcopy(draw(evil))
        *path, key = draw(st.sampled_from(places))
        parent = value
        for part in path:
            parent = parent[part]
        action = draw(st.sampled_from(["replace", "replace", "replace", "number", "remove", "rename", "copy"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(evil))  # the same list may come again
        elif action == "number" and isinstance(parent[key], int):
            parent[key] = parent[key] + draw(st.sampled_from([-1, 1, 2, 7, 10**6, 10**9]))
        elif action == "remove":
            del parent[key]
        elif action == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
        else:
            *path, other = draw(st.sampled_from(places))
            source = value
            for part in path:
                if not isinstance(source, dict | list) or (isinstance(source, dict) and part not in source):
                    return value
                if isinstance(source, list) and not (isinstance(part, int) and part < len(source)):
                    return value
                source = source[part]
            if (isinstance(source, dict) and other in source) or (
                isinstance(source, list) and isinstance(other, int) and other < len(source)
            ):
                parent[key] = copy.deepcopy(source[other])
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes, first: int = 1 << 16) -> bytes:
    """Bytes with some changed, cut off, doubled or put in; `first`: how far in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(len(changed), first)))
        action = draw(st.sampled_from(["set", "set", "cut", "insert", "double", "remove"]))
        if action == "cut":
            del changed[place:]
        elif action == "insert":
            changed[place:place] = draw(st.binary(max_size=8))
        elif action == "double":
            changed[place:place] = changed[place : place + 16]
        elif action == "remove":
            del changed[place : place + draw(st.integers(1, 16))]
        else:
            changed[place : place + 1] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"{", b'"', b"9"]))
    return bytes(changed)


@st.composite
def text_of(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file: a mutated value, or its text damaged."""
    how = draw(st.integers(0, 20))
    if how == 0:  # deeper than any parser goes
        return json.dumps(value).encode().replace(b": ", b": " + b"[" * 100_000, draw(st.integers(1, 2)))
    if how < 17:
        return json.dumps(draw(mutated(value))).encode()
    return draw(damaged(json.dumps(value).encode()))
