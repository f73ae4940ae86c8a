"""What a terminal and what a pipe get to see, from real processes."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtool
from qtool.console import Console
from qtool.errors import InputError

ROOT = str(Path(qtool.__file__).parent.parent)
LONG = "/a/very/long/path/" + "x" * 200
EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b1m\u202eb\u2066\r\nc\rd\x7f"
WORDS = " ".join(["considerably"] * 30)
SEEN = r"a\u001b]0;owned\u0007\u001b[2J\u009b1m\u202eb\u2066"
SCRIPT = f"""
import sys, time
from qtool.console import Console
from qtool.errors import InputError
if "evil" in sys.argv:
    with Console() as console:
        console.result({EVIL!r})
        console.result({{"é": {EVIL!r}}})
        console.piece({EVIL!r})
    sys.exit()
with Console(quiet="quiet" in sys.argv, json="json" in sys.argv) as console:
    console.info("hello [red]{LONG}[/red]")
    console.info({WORDS!r}, prose=True)
    for done in range(4):
        console.event({{"event": "progress", "stage": "quantize", "done": done, "total": 3, "unit": "layers"}})
        time.sleep(0.1)
    console.event({{"event": "item", "data": {{}}}})
    console.event({{"event": "warning", "message": "careful"}})
    if "long" in sys.argv:
        console.warning({WORDS!r} + " {LONG}")
        console.error(InputError({WORDS!r} + " {LONG}"))
        console.error(InputError("x", hint={WORDS!r}))
        console.error(InputError("x", hint="Run: qtool " + {WORDS!r}))
        console.table("", ["a name", "b"], [["{LONG}", {WORDS!r}]])
    console.table("Quality", ["model", "kl"], [["a [b]", 0.00971], ["c", 3]])
    console.error(InputError("bad\\nthing", where="file:3", hint="mend it"))
    console.result({{"path": "/é"}} if "dict" in sys.argv else "/pa\\ud800th")
"""
ENV = {**os.environ, "PYTHONPATH": ROOT, "PYTHONUTF8": "1", "COLUMNS": "100", "TERM": "xterm"}


def piped(*args: str, **env: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], env={**ENV, **env}, capture_output=True, check=True, timeout=60
    )
    return done.stdout.decode(), done.stderr.decode()


def on_terminal(*args: str) -> str:
    """Everything that the process writes to a pseudo-terminal that is its stdin, stdout and stderr."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *args], env=ENV, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    data = b""
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            break
        if not chunk:
            break
        data += chunk
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return data.decode()


def test_a_pipe_gets_plain_lines() -> None:
    stdout, stderr = piped()
    assert stdout == "/pa\\ud800th\n"
    assert "\x1b" not in stderr
    lines = stderr.splitlines()
    assert lines[:4] == [f"hello [red]{LONG}[/red]", WORDS, "quantize (3 layers)", "warning: careful"]
    assert lines[-3:] == ["error: bad thing", "  at: file:3", "  → mend it"]
    table = "\n".join(lines[4:-3])
    assert re.search(r"a \[b\] .* 0\.00971 ", table)
    assert "Quality" in table


def test_quiet_leaves_warnings_errors_and_the_result() -> None:
    stdout, stderr = piped("quiet")
    assert stdout == "/pa\\ud800th\n"
    assert stderr == "warning: careful\nerror: bad thing\n  at: file:3\n  → mend it\n"


def test_json() -> None:
    stdout, _ = piped("json", "quiet")
    assert json.loads(stdout) == "/pa\ud800th"
    stdout, _ = piped("json", "quiet", "dict")
    assert stdout == '{"path": "/é"}\n'
    stdout, stderr = piped("json", "quiet", "dict", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert json.loads(stdout) == {"path": "/é"}
    assert stderr.endswith("\\u2192 mend it\n")


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    output = on_terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert re.search(r"quantize .*3/3 layers, 0:0\d", plain)
    assert LONG in plain  # never wrapped
    assert plain.index("3/3") < plain.index("error: bad thing")
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is back
    assert plain.rstrip().endswith("/pa\\ud800th")


def test_a_terminal_breaks_prose_between_words_and_leaves_paths_whole() -> None:
    output = on_terminal().replace("\r\n", "\n")
    lines = [line for line in output.splitlines() if "considerably" in line]
    assert len(lines) > 1
    assert all(len(line) <= 100 for line in lines)
    assert " ".join(lines).split() == WORDS.split()
    assert LONG in output
    assert WORDS in piped()[1].splitlines()


def test_warnings_and_errors_are_broken_between_words_and_tables_show_all() -> None:
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal("long")).replace("\r", "")
    lines = plain.splitlines()
    for first in ("warning: considerably", "error: considerably"):
        begin = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i > begin and LONG in line)
        assert lines[end] == LONG
        message = [lines[begin][lines[begin].index(first) :], *lines[begin + 1 : end]]  # a bar may have been before it
        assert all(len(line) <= 100 for line in message)
        assert " ".join(message).count("considerably") == 30
    assert f"  → {WORDS}" not in plain
    assert f"  → Run: qtool {WORDS}" in plain  # a command is copied in one piece
    title = next(i for i, line in enumerate(lines) if "a name" in line)
    rows = itertools.takewhile(lambda line: line.startswith("│"), lines[title + 2 :])
    assert "".join(row.split("│")[1].strip() for row in rows) == LONG
    assert "…" not in plain


def test_a_quiet_terminal_has_no_bar() -> None:
    assert "quantize" not in on_terminal("quiet")


def test_importing_it_is_cheap() -> None:
    code = "import sys, qtool.console, qtool.workers; print({'rich', 'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], env=ENV, text=True) == "set()\n"


def test_bytes_have_a_unit_that_suits_them(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        console.progress("downloading", 0, 2_500_000, "bytes")
    assert capsys.readouterr().err == "downloading (2.5 MB)\n"


def test_what_would_command_a_terminal_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        console.info(EVIL)
        console.warning(EVIL)
        console.event({"event": "warning", "message": EVIL})
        console.event({"event": "progress", "stage": EVIL, "done": 0, "total": 1, "unit": "layers"})
        console.error(InputError(EVIL, where=EVIL, hint=EVIL))
        console.table(EVIL, [EVIL], [[EVIL]])
        console.table(EVIL, [EVIL], [[EVIL]], result=True)
    for text in capsys.readouterr():
        assert SEEN in text
        assert not {character for character in text if not character.isprintable()} - {"\n"}


def test_a_terminal_is_never_commanded_by_a_result() -> None:
    """A file or another program gets it as it is."""
    out, _ = piped("evil")
    assert out == f"{EVIL}\n".replace("\r\n", "\r\n") + json.dumps({"é": EVIL}, ensure_ascii=False) + "\n" + EVIL
    shown = on_terminal("evil")
    assert "owned" in shown
    assert not re.search("\x1b\\]|\x1b\\[2J|\x9b|\u202e", shown)
    json_line = next(line for line in shown.splitlines() if line.startswith('  "é"'))
    assert json.loads("{" + json_line + "}") == {"é": EVIL}


def test_a_line_has_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 99_000_000
    with Console() as console:
        console.warning(f"{long}\nsecond")
        console.error(InputError(long, where=long, hint=long))
        console.progress(long, 0, 0)
        console.table(long, [long], [[long]])
    text = capsys.readouterr().err
    assert len(text) < 100_000
    assert "… (99,000,009 characters)\nsecond\n" in text
    with Console() as console:
        console.result("x" * 10_000)
    assert capsys.readouterr().out == "x" * 10_000 + "\n"


def test_a_log_has_whole_cells(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [f"{name}-{'x' * 40}" for name in "abcdef"]
    Console().table("", list("ABCDEF"), [cells])
    Console().table("", list("ABCDEF"), [cells], result=True)
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert all(cell in text for cell in cells)
