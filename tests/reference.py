"""What the documentation's site takes from the program itself: a hook of mkdocs (see mkdocs.yml).

A page of all commands, from what `--help` has; and on the page of Python a section for each function, from its
docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import qtool
from qtool.cli import app
from qtool.cli.helptexts import MESSAGES, _names, _told, sections

PAGE, PYTHON = "commands.md", "python.md"
FUNCTIONS = ("quantize", "evaluate", "generate", "convert", "inspect", "download")
_INTRODUCTION = """# Commands

Every command with all of its options, as `qtool COMMAND --help` shows them. All commands also have these:

| option | what it does |
| --- | --- |
| `--json` | Print the result as JSON (see [JSON for programs](json.md)). |
| `-q`, `--quiet` | Print only the result and errors. |
| `--debug` | Show the traceback of an error. |
| `-h`, `--help` | Show the help of the command. |

`qtool --version` prints the version. `qtool --install-completion` completes commands, options and names of recipes
in your shell; `qtool --show-completion` prints the script that does it.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those in docs."""
    files.append(File.generated(config, PAGE, content=markdown()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page of Python with the functions' sections."""
    if page.file.src_path != PYTHON:
        return markdown
    return "\n".join((markdown, *(function(name, getattr(qtool, name)) for name in FUNCTIONS)))


def function(name: str, called: Any) -> str:
    """One function: its signature, and its docstring as Markdown."""
    signature = inspect.signature(called)
    lines = []
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        text = f"{'**' if each.kind is each.VAR_KEYWORD else ''}{each.name}: {each.annotation}"
        if each.default is not each.empty:
            text += f" = {each.default.__name__ if callable(each.default) else repr(each.default)}"
        lines.append(f"    {text},")
    code = "\n".join((f"qtool.{name}(", *lines, f") -> {signature.return_annotation}"))
    return f"## {name}\n\n```python\n{code}\n```\n\n{docstring(inspect.getdoc(called) or '')}\n"


def docstring(text: str) -> str:
    """A docstring as Markdown: the names under `Args:` and the like become a list."""
    lines = []
    inside = False
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Raises|Returns|Yields|Attributes):", line):
            inside = True
            lines += [f"**{heading[1]}**", ""]
        elif inside and (item := re.fullmatch(r"    ([\w*][\w*, ]*): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif inside and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and (not line or line.startswith(" "))
            lines.append(line.strip() if line.startswith("    ") else line)
    return "\n".join(lines)


def commands() -> Iterator[tuple[str, Any]]:
    """Each command that does something, by the words that call it."""
    for name in app.COMMANDS:
        command: Any = app.load(name)
        for below, inner in getattr(command, "commands", {"": command}).items():
            yield f"{name} {below}".strip(), inner


def markdown() -> str:
    """The whole page."""
    return "\n".join((_INTRODUCTION, *(section(name, command) for name, command in commands())))


def section(name: str, command: Any) -> str:
    """One command: what it does, its examples, and its arguments and options by panel."""
    text, _, examples = str(command.help).partition("Examples:")
    lines = [f"## qtool {name}", "", text.replace("\b", "").strip(), ""]
    if shown := [" ".join(each.split()) for each in re.split(r"\n\s*\n", examples) if each.strip()]:
        lines += ["```console", *(f"$ {each}" for each in shown), "```", ""]
    context = command.make_context(name, [], resilient_parsing=True)
    for title, params in sections(command, context).items():
        if title != MESSAGES:
            lines += [f"| {title} | |", "| --- | --- |"]
            lines += [f"| {_code(_names(param))} | {_cell(_told(param, context))} |" for param in params]
            lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`"  # a bar ends no cell here


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
