"""What is on a person's screen when a command has ended, in terminals of two sizes: results, and nothing left over."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_run import write_recipe
from tests.hub.fixtures import Hub, model_files
from tests.hub.loopback import Repo
from tests.launcher import Launcher
from tests.terminal import Terminal

SIZES = [(80, 24), pytest.param((160, 50), marks=pytest.mark.slow)]
WORKING = {"analyze", "chat", "convert", "download", "eval", "generate", "quantize", "run", "tune"}
"""Commands that start a worker, which takes seconds until it has something to tell."""

Seen = Callable[..., Terminal]


@pytest.fixture(params=SIZES, ids=["small", "large"])
def seen(request: Any, launcher: Launcher, qtool_environment: dict[str, str], tmp_path: Path) -> Iterator[Seen]:
    """seen(*args, env={}, code=0) -> the terminal in which `qtool ARGS` has ended."""
    opened = []

    def run(*args: object, env: dict[str, str] | None = None, code: int = 0) -> Terminal:
        environment = {**qtool_environment, **(env or {})}
        terminal = Terminal(launcher.start, args, env=environment, size=request.param, cwd=tmp_path)
        opened.append(terminal)
        assert terminal.end() == code, terminal.text
        assert_tidy(terminal)
        if args[0] in WORKING:
            assert re.match(r"(\w+: begins)?\s*(starting|asking) ", terminal.drawn), terminal.drawn[:200]
        return terminal

    yield run
    for terminal in opened:
        terminal.__exit__(None, None, None)


def assert_tidy(terminal: Terminal) -> None:
    """No bar and no escape is left, and the cursor is back."""
    assert not re.search("━{4,}[^┓┩┃]*$|╸|╺", terminal.text, re.MULTILINE), terminal.text
    assert "\x1b" not in terminal.text
    assert not re.search(r"\[\d+[A-Z]|\[[A-Z]\b|\[\?25", terminal.text), terminal.text
    assert terminal.cursor_is_shown


def tables(terminal: Terminal) -> list[list[str]]:
    """The lines of each table, whole from its top to its bottom; of each row the first line."""
    found: list[list[str]] = []
    inside = False
    for line in terminal.lines:
        if line.startswith("┏"):
            assert not inside, terminal.text
            inside = True
            found.append([])
        if inside:
            assert line[:1] in "┏┃┡├│└", terminal.text
            if not re.match(r"│ +│", line):  # the rest of cells that are too wide for one line
                found[-1].append(line)
        if line.startswith("└"):
            inside = False
    assert not inside, terminal.text
    return found


def test_run(seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, also="[golden-stick]")
    terminal = seen("run", recipe, tiny_llama, "--work", "job", "--engine", "native", "--runtime", "transformers")
    stages, sizes, cost = tables(terminal)
    assert [line.split()[1] for line in stages[3:-1]] == ["quantize", "eval", "convert", "generate"]
    assert [line.split()[1] for line in sizes[3:-1]] == ["float", "compressed-tensors", "golden-stick"]
    assert len(cost) == 3 + 4 + 1
    assert terminal.lines[: len(terminal.text.split("\n"))][-1] == str(tmp_path / "job")
    assert "I am" in terminal.text
    said = [line for line in terminal.lines if line.startswith("quantize: ")]
    assert said[0] == "quantize: begins"
    assert re.fullmatch(r"quantize: done in \d+\.\d s", said[1])


def test_quantize(seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--scheme", "w8a8-static", "--samples", "2", "--seq-len", "16")
    terminal = seen("quantize", tiny_llama, "--engine", "native", "--output", "made", *options)
    assert [line for line in terminal.lines if line][-1] == str(tmp_path / "made")
    drawn = terminal.drawn
    assert drawn.index("starting ") < drawn.index("2/2 layers")  # before the worker has said anything


def test_a_plan(seen: Seen, tiny_llama: Path) -> None:
    terminal = seen("quantize", tiny_llama, "--engine", "native", "--dry-run", "--output", "made")
    (plan,) = tables(terminal)
    assert "model.layers." in "".join(plan)


def test_eval(seen: Seen, tiny_llama: Path) -> None:
    short = ("--samples", "2", "--seq-len", "16", "--scheme", "w8a8-dynamic")
    seen("quantize", tiny_llama, "--engine", "native", "--output", "made", *short)
    terminal = seen("eval", tiny_llama, "made", "--windows", "2", "--length", "16", "--report", "report.html")
    (figures,) = tables(terminal)
    assert any("KL divergence" in line for line in figures)
    assert "writing the report " in terminal.drawn
    assert "report: " in text_of(terminal)


def test_tune(seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    short = ("--windows", "2", "--length", "16", "--samples", "2", "--seq-len", "16", "--budget", "2")
    terminal = seen("tune", tiny_llama, "--max-size", "110%", "--output", "tuned.yaml", *short)
    assert [line for line in terminal.lines if line][-1] == str(tmp_path / "tuned.yaml")
    figures, frontier, *changed = tables(terminal)
    sizes = [float(line.split()[1]) for line in frontier[3:-1]]
    assert 2 <= len(sizes) <= 8
    assert sizes == sorted(sizes)
    assert [line.split()[1] for line in figures[3:-1]] == ["reference", "tuned"]
    count = int(re.search(r"(\d+) groups of linears changed", terminal.text)[1])  # type: ignore[index]
    assert len(changed) == min(count, 1)


@pytest.mark.parametrize(("size", "told"), [("10KB", "the limit is 10.0 kB"), ("95%", "the limit is 95% of that")])
def test_an_impossible_size_is_refused_before_anything_is_measured(
    seen: Seen, tiny_llama: Path, size: str, told: str
) -> None:
    terminal = seen("tune", tiny_llama, "--max-size", size, code=2)
    said = " ".join(terminal.text.split())
    assert re.search(rf"these precisions make at least \d+\.\d kB, and {told}", said), said
    assert "backward" not in terminal.drawn


def test_generate(seen: Seen, tiny_llama: Path) -> None:
    asked = ("-p", "If the", "-p", "A test", "--max-tokens", "4", "--runtime", "transformers")
    terminal = seen("generate", tiny_llama, *asked)
    shown = [line for line in terminal.lines if line]
    assert any(line.startswith("If the") for line in shown)
    assert any(line.startswith("A test") for line in shown)
    assert re.match(r"2 answers, \d+ tokens in ", shown[-1])
    assert "The model continues each prompt as plain text (--raw)." in " ".join(shown)
    if "2 answers, 8 tokens" in shown[-1]:  # neither came to its end
        assert terminal.text.count("[cut off after 4 tokens: --max-tokens allows more]") == 2


def test_convert(seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    short = ("--samples", "2", "--seq-len", "16", "--scheme", "w8a8-static")
    seen("quantize", tiny_llama, "--engine", "native", "--output", "made", *short)
    terminal = seen("convert", "made", "--to", "golden-stick", "--output", "other")
    assert [line for line in terminal.lines if line][-1] == str(tmp_path / "other")


def test_download(seen: Seen, huggingface: Hub, tmp_path: Path) -> None:
    huggingface.server.repos["org/model"] = Repo(model_files())
    terminal = seen("download", "org/model", env=huggingface.env)
    assert [line for line in terminal.lines if line][-1] == str(tmp_path / "model")
    assert "asking Hugging Face" in terminal.drawn


@pytest.mark.parametrize(
    ("command", "at_the_end"),
    [
        (("inspect", "MODEL"), "in bfloat16"),
        (("inspect", "MODEL", "--tensors", "--filter", "norm"), "model.norm.weight"),
        (("runtimes", "MODEL"), "transformers"),
        (("upload", "MODEL", "me/mine", "--dry-run"), "model.safetensors"),
        (("recipes", "list"), "deepseek-r1-0528-w8a8-fa3"),
        (("recipes", "validate", "default"), "default"),
        (("recipes", "show", "default"), "schemes:"),
        (("schema",), "quantize-dry-run"),
        (("config",), "No defaults are set."),
        (("env", "list"), "golden-stick"),
        (("env", "vars"), "HF_HUB_OFFLINE"),
        (("--help",), "doctor"),
    ],
    ids=lambda value: "-".join(value).lower().replace("/", "-") if isinstance(value, tuple) else None,
)
def test_what_is_printed_at_once(seen: Seen, tiny_llama: Path, command: tuple[str, ...], at_the_end: str) -> None:
    """Tables are whole and nothing in them is cut off, however narrow the terminal is."""
    terminal = seen(*(tiny_llama if word == "MODEL" else word for word in command))
    tables(terminal)
    assert "…" not in terminal.text, terminal.text
    assert at_the_end in re.sub(r"\s*│\s*\n│\s*", "", terminal.text) or at_the_end in unfolded(terminal)


def test_analyze(seen: Seen, tiny_llama: Path) -> None:
    short = ("--windows", "1", "--length", "16", "--samples", "2", "--seq-len", "16")
    (ranked,) = tables(seen("analyze", tiny_llama, "--top", "3", *short))
    assert len(ranked) >= 3 + 3 + 1


@pytest.mark.slow
def test_doctor(seen: Seen) -> None:
    terminal = seen("doctor")
    assert text_of(terminal).endswith("Nothing to do: an engine and a runtime work here.")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (160, 50)], ids=["small", "large"])
def test_chat(
    launcher: Launcher, qtool_environment: dict[str, str], tiny_llama: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    command = ("chat", tiny_llama, "--runtime", "transformers", "--max-tokens", "4")
    with Terminal(launcher.start, command, env=qtool_environment, size=size, cwd=tmp_path) as terminal:
        terminal.until(r"/exit ends(.|\n)*\n>$")
        terminal.write("hi\n")
        terminal.until(r"\n\[\d+ tokens[^\n]*(\n[^\n]*)?\]\n>$")
        terminal.write("/exit\n")
        assert terminal.end() == 0
        assert re.match(r"\s*starting ", terminal.drawn)
        assert_tidy(terminal)


def test_ctrl_c_says_how_to_go_on(
    launcher: Launcher, qtool_environment: dict[str, str], tiny_llama: Path, tmp_path: Path
) -> None:
    long = ("--samples", "512", "--seq-len", "256")
    command = ("quantize", tiny_llama, "--engine", "native", "--output", "made", *long)
    with Terminal(launcher.start, command, env=qtool_environment, size=(80, 24), cwd=tmp_path) as terminal:
        terminal.until(r"\d/\d+ layers")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        assert_tidy(terminal)
        said = "".join(terminal.lines)  # a command is not broken between words, so that it can be copied
    assert re.search(r"stopped in: \w.*, \d/\d+ layers", said), said
    assert re.search(r"interrupted  → To go on from what is finished: qtool quantize .* --resume$", said), said


def text_of(terminal: Terminal) -> str:
    """What is on the screen in one line."""
    return " ".join(terminal.text.split())


def unfolded(terminal: Terminal) -> str:
    """The first column of all tables, without what folds it."""
    return "".join(line.split("│")[1].strip() for line in terminal.lines if line.startswith("│"))


def test_a_failure_says_how_far_it_came(seen: Seen, tmp_path: Path) -> None:
    terminal = seen("quantize", "nothing", code=2)
    assert next(line for line in terminal.lines if line).startswith("error: ")
