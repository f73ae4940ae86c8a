"""The root of the command line: overview, laziness, exit codes, and how what goes wrong is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import qtool
from qtool.cli import app
from qtool.cli.options import Debug, Json, Quiet, common, console, path_or_stdin, resumable
from qtool.errors import InputError, QtoolError

HEAVY = ("torch", "transformers", "vllm", "numpy", "pyarrow", "pydantic", "rich", "yaml", "huggingface_hub")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """command(body, *args) -> the exit code of `qtool work ARGS`, where `work` runs `body`."""

    def run(body: Callable[[], Any], *args: str) -> int:
        def work(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
            body()

        monkeypatch.setattr(sys.modules[__name__], "work", work, raising=False)
        monkeypatch.setitem(app.COMMANDS, "work", (f"{__name__}:work", "Works."))
        monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
        return app.run(["work", *args])

    return run


def failing(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def test_help_lists_every_command_and_imports_none(qtool_environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom qtool.cli.app import run\ncode = run(['--help'])\n"
        "print(code, *sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=qtool_environment, capture_output=True, text=True, check=True
    )
    exit_code, *modules = done.stderr.split()
    assert exit_code == "0"
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)
    assert not [
        name
        for name in modules
        if re.match(r"qtool\.(cli\.(?!app|helptexts|options|streams)|engines|runtime|recipe)", name)
    ]
    for name, (_, summary) in app.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", done.stdout, re.MULTILINE)


def test_version(run_qtool: Any) -> None:
    done = run_qtool("--version")
    assert (done.code, done.stdout, done.stderr) == (0, f"qtool {qtool.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["recipez"], "Did you mean 'recipes'?"),
        (["recipes", "shw"], "Did you mean 'show'?"),
        (["--no-such"], "No such option"),
        (["recipes", "show"], "Missing argument"),
        (["recipes", "list", "--jsno"], "--json"),
        (["quantize", "m", "--format", "foo"], "'--format': 'foo' is not one of 'compressed-tensors'"),
        (["quantize", "m", "--samples", "x"], "'--samples': must be a whole number, not 'x'"),
        (["eval", "a", "b", "--windows", "0"], "'--windows': must be 1 or more, not '0'"),
        (["generate", "m", "--temperature", "hot"], "must be a number, not 'hot'"),
    ],
)
def test_wrong_usage_is_code_2_on_stderr(run_qtool: Any, args: list[str], message: str) -> None:
    done = run_qtool(*args)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    for words in ("Traceback", "Input should", "Value error"):  # the last two are pydantic's
        assert words not in done.stderr


def test_every_command_of_the_table_has_help(run_qtool: Any) -> None:
    for name in app.COMMANDS:
        done = run_qtool(name, "--help")
        assert done.code == 0, done.stderr
        assert done.stdout.startswith(f"Usage: qtool {name} ")


def test_completion_knows_commands_options_and_recipes(run_qtool: Any) -> None:
    def complete(words: str) -> list[str]:
        env = {"_QTOOL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return run_qtool(env=env).stdout.split()

    assert complete("qtool re") == ["recipes"]
    assert set(complete("qtool ")) == set(app.COMMANDS)
    assert complete("qtool recipes li") == ["list"]
    assert complete("qtool recipes show smol") == ["smollm2"]
    assert "--json" in complete("qtool recipes list --js")


@pytest.mark.parametrize(("kind", "code"), [(QtoolError, 1), (InputError, 2)])
def test_errors_say_what_where_and_what_next(
    command: Any, capsys: pytest.CaptureFixture[str], kind: type[QtoolError], code: int
) -> None:
    assert command(failing(kind("it broke", where="file.txt:3", hint="mend it"))) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("it broke", "file.txt:3", "mend it"):
        assert part in captured.err
    assert len(captured.err.splitlines()) <= 3


@pytest.mark.parametrize("error", [QtoolError("it broke"), ZeroDivisionError("division by zero")])
def test_the_traceback_comes_with_debug_only(
    command: Any, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert command(failing(error)) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert command(failing(error), "--debug") == 1
    assert "in body" in capsys.readouterr().err


def test_the_unexpected_is_called_a_bug(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(RuntimeError("several\nlines"))) == 1
    err = capsys.readouterr().err
    assert "this is a bug in qtool: RuntimeError: several lines" in err
    assert "--debug" in err
    assert len(err.splitlines()) == 2


def test_a_bug_has_the_address_of_the_project(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one in the metadata of what is installed, which pyproject.toml gives."""
    (tmp_path / "qtool-9.dist-info").mkdir()
    (tmp_path / "qtool-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: qtool\nVersion: 9\n"
        "Project-URL: Home, https://example.org\nProject-URL: Issues, https://example.org/issues\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert command(failing(RuntimeError("oh"))) == 1
    assert "report what it shows at https://example.org/issues." in capsys.readouterr().err


def test_common_options_reach_the_console(command: Any) -> None:
    seen = []
    command(lambda: seen.append((common.json, common.quiet, common.debug, console().json, console().quiet)))
    command(
        lambda: seen.append((common.json, common.quiet, common.debug, console().json, console().quiet)), "--json", "-q"
    )
    assert seen == [(False, False, False, False, False), (True, True, False, True, True)]


@pytest.mark.parametrize("code", [0, 1, 2, 7])
def test_a_command_may_choose_its_exit_code(command: Any, code: int) -> None:
    assert command(failing(typer.Exit(code))) == code


def test_interruption_is_code_130(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda v: str(v)
)
def test_a_signal_unwinds_the_command(
    qtool_environment: dict[str, str], tmp_path: Path, number: int, code: int
) -> None:
    (tmp_path / "sleepy.py").write_text(
        "import time\n"
        "def work() -> None:\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
    )
    program = (
        "import signal, sys\nfrom qtool.cli import app\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # which nohup has everything ignore
        "app.COMMANDS['work'] = ('sleepy:work', 'Works.')\nsys.exit(app.run(['work']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**qtool_environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{qtool_environment['PYTHONPATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "cleaned up\n", "interrupted\n")


def test_an_interruption_says_how_to_go_on(command: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def again(**options: Any) -> Callable[[], None]:
        def body() -> None:
            resumable(**options)
            raise KeyboardInterrupt

        return body

    told = "interrupted\n  → To go on from what is finished: qtool work 'a b'"
    for argv, options, line in (
        (["work", "a b"], {}, f"{told} --resume\n"),
        (["work", "a b", "--resume"], {}, f"{told} --resume\n"),
        (["work", "a b"], {"by": None}, f"{told}\n"),
        (["work", "-"], {}, "interrupted\n"),  # what came from another command is gone
    ):
        monkeypatch.setattr(sys, "argv", ["qtool", *argv])
        assert command(again(**options)) == 130
        assert capsys.readouterr().err == line
    assert command(again(), "--quiet") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_closed_pipe_is_quiet(qtool_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qtool", "recipes", "show", "default"],
        env=qtool_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1


def test_a_dash_reads_the_path_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    assert path_or_stdin("folder") == "folder"
    monkeypatch.setattr(sys, "stdin", io.StringIO("/some/where with spaces\nmore\n"))
    assert path_or_stdin("-") == "/some/where with spaces"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(InputError, match="no path on standard input"):
        path_or_stdin("-")


def test_an_interruption_that_python_has_wrapped(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interruption:
            raise RuntimeError("Error calling __set_name__") from interruption

    assert command(body) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interruption_inside_exec(tmp_path: Path, qtool_environment: dict[str, str]) -> None:
    """As when Ctrl-C strikes while a dataclass is being defined: Python 3.11 would end `python -m` by the signal."""
    lines = ["from qtool.cli import app", "def load(name): exec('raise KeyboardInterrupt')", "app.load = load"]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    path = f"{tmp_path}{os.pathsep}{qtool_environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "qtool", "doctor"]
    done = subprocess.run(command, env={**qtool_environment, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "args",
    [
        ("no\x1b[2Jsuch",),
        ("inspect", "--no\x1b[2Jsuch"),
        ("quantize", "x", "--samples", "a\x1b[2Jb"),
        ("eval", "a", "b", "--runtime", "a\x1b[2Jb"),
        ("recipes", "sh\x9bow"),
        ("inspect", "a\x1b[2Jb"),
    ],
)
def test_what_was_typed_does_not_command_the_terminal(run_qtool: Any, args: tuple[str, ...]) -> None:
    done = run_qtool(*args)
    assert done.code == 2
    assert done.stderr.replace("\n", "").isprintable()
