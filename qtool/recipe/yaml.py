"""A strict reader of YAML that remembers the line of every key.

Only plain data: no tags of Python objects, no anchors and aliases (so no exponential documents), no duplicate
keys, text keys only. What is wrong is collected as `Problem`s with a line, not thrown one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
_LONGEST_NUMBER = 100  # characters of what is not text: YAML has numbers to the base 60, which take long to add up
_TEXT = "tag:yaml.org,2002:str"
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}

_TAGS: dict[type[yaml.Node], str] = {
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
    yaml.MappingNode: "tag:yaml.org,2002:map",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong: `line` counts from 1; `key` is the dotted path of the key concerned, or empty."""

    line: int
    key: str
    message: str
    file: str = ""


@dataclass
class Document:
    """A parsed document: plain data, and the line (from 1) where the value at each path begins."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(path: Path) -> str:
    """schemes.w8a8[0].layers"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse(text: bytes) -> Document:
    """Parse one YAML document. Never raises for bad content: see `Document.problems`."""
    document = Document(None)
    if len(text) > MAX_BYTES:
        return _failed(document, 1, f"{len(text)} bytes, but at most {MAX_BYTES} are read")
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _failed(document, text[: error.start].count(b"\n") + 1, "not UTF-8 text")
    unprintable = yaml.reader.Reader.NON_PRINTABLE.search(decoded)
    if unprintable:
        line = decoded.count("\n", 0, unprintable.start()) + 1
        return _failed(document, line, f"unprintable character U+{ord(unprintable.group()):04X}")
    loader = yaml.SafeLoader(decoded)
    try:
        if not _check_events(decoded, document):
            return document
        root = loader.get_single_node()
        if root is None:
            return _failed(document, 1, "the file is empty")
        document.data = _build(loader, root, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, [error.context, error.problem]))
        return _failed(document, mark.line + 1 if mark else 1, f"not valid YAML: {what}")
    except yaml.YAMLError as error:
        return _failed(document, 1, f"not valid YAML: {' '.join(str(error).split())}")
    finally:
        loader.dispose()
    return document


def _failed(document: Document, line: int, message: str) -> Document:
    document.data = None
    document.problems.append(Problem(line, "", message))
    return document


def _check_events(text: str, document: Document) -> bool:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            _failed(document, line, f"anchors and aliases are not supported (here {anchor!r})")
            return False
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                _failed(document, line, f"nested more than {MAX_DEPTH} levels deep")
                return False
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return True


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1 if node.start_mark else 1


def _build(loader: yaml.SafeLoader, node: yaml.Node, path: Path, document: Document) -> Any:
    line = _line(node)
    document.lines.setdefault(path, line)
    expected = _TAGS.get(type(node))
    if node.tag != expected if expected else node.tag not in _PLAIN:
        document.problems.append(Problem(line, dotted(path), f"tag {node.tag!r} is not supported"))
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, child, (*path, i), document) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = _line(key_node)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) and key_node.tag == _TEXT else None
            if not isinstance(key, str):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                message = f"a key must be text, not {shown!r} (put it in quotes)"
                document.problems.append(Problem(key_line, dotted(path), message))
                continue
            inner = (*path, key)
            if key in result:
                message = f"duplicate key, first on line {document.lines[inner]}"
                document.problems.append(Problem(key_line, dotted(inner), message))
                continue
            document.lines[inner] = key_line
            result[key] = _build(loader, value_node, inner, document)
        return result
    if node.tag == _TEXT:
        return node.value
    try:
        if len(node.value) > _LONGEST_NUMBER:
            raise ValueError
        return loader.construct_object(node)
    except Exception:  # !!int abc, the date 2024-02-31, !!bool '': PyYAML raises whatever comes
        document.problems.append(Problem(line, dotted(path), f"not a valid {node.tag.rpartition(':')[2]}"))
        return None
