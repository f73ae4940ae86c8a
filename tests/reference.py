"""The page of all commands in the documentation's site, from what `--help` has: a hook of mkdocs (see mkdocs.yml)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from qtool.cli import app
from qtool.cli.helptexts import MESSAGES, _names, _told, sections

PAGE = "commands.md"
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
