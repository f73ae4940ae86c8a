"""Terminal captures for the documents, from real runs: `python -m tests.captures WORK [NAME...]`.

WORK holds a model, SmolLM2-135M-Instruct. Each command runs there in a terminal; what is on its screen at the end is
written to docs/captures as NAME.txt and NAME.svg. README quotes some of them; its block is written as well.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.terminal import Terminal

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = ROOT / "docs" / "captures"
QUOTED = ("quantize", "eval", "generate")
SIZE = (100, 40)  # columns that a page of the site shows without scrolling
MODEL, QUANTIZED = "SmolLM2-135M-Instruct", "SmolLM2-W8A8"
COMMANDS: dict[str, Sequence[str]] = {
    "quantize": ("quantize", MODEL, "--output", QUANTIZED, "--overwrite"),
    "eval": ("eval", MODEL, QUANTIZED),
    "generate": ("generate", QUANTIZED, "--chat", "--prompt", "What is the capital of France?"),
    "inspect": ("inspect", QUANTIZED),
    "plan": ("quantize", MODEL, "--dry-run"),
    "help": ("--help",),
}
HIDDEN = {"--overwrite"}  # a second run of this script needs it; a reader does not


def shown(command: Sequence[str]) -> str:
    """The command as somebody types it."""
    words = (f'"{word}"' if " " in word else word for word in command if word not in HIDDEN)
    return " ".join(("$ qtool", *words))


def capture(command: Sequence[str], work: Path) -> Terminal:
    """The terminal in which a command has ended well."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "qtool", *command]
    with Terminal(subprocess.Popen, words, env=env, size=SIZE, cwd=work) as terminal:
        if (code := terminal.end(3000)) != 0:
            raise SystemExit(f"exit code {code}:\n{terminal.text}")
    return terminal


def picture(title: str, command: str, terminal: Terminal) -> str:
    """An SVG of the command and its screen, as rich draws it, with fonts that the reader has."""
    console = Console(record=True, width=SIZE[0], file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(command, style="bold"))
    for line in terminal.styled:
        console.print(line, soft_wrap=True)
    return console.export_svg(title=title)


def quote(readme: Path) -> None:
    """Put the captures into README's block for them."""
    text = readme.read_text(encoding="utf-8")
    blocks = "\n".join(f"```text\n{(CAPTURES / f'{name}.txt').read_text('utf-8')}```\n" for name in QUOTED)
    whole = re.sub(r"(<!-- captures: begin[^\n]*\n).*?(<!-- captures: end)", rf"\1{blocks}\2", text, flags=re.DOTALL)
    readme.write_text(whole, encoding="utf-8")


def main(work: str, *names: str) -> None:
    for name in names or COMMANDS:
        terminal = capture(COMMANDS[name], Path(work))
        command = shown(COMMANDS[name])
        text = "\n".join((command, terminal.text, ""))
        (CAPTURES / f"{name}.txt").write_text(text, encoding="utf-8")
        (CAPTURES / f"{name}.svg").write_text(picture(f"qtool {name}", command, terminal), encoding="utf-8")
        print(text, flush=True)
    quote(ROOT / "README.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
