"""Workers as real processes that fail in every way a process can."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import workers
from qtool.errors import InputError, QtoolError, WorkerDied
from qtool.workers import parent as parent_side

MODULE = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path

def main(job, report):
    return globals()[job.pop("do")](job, report)

def echo(job, report):
    report.progress("stage", 1, 2)
    report.warning("careful")
    report.item({"i": 0})
    return job

def imported(job, report):
    return {"modules": sorted(sys.modules), "path": sys.path}

def killed(job, report):
    report.progress("stage", 1, 2)
    os.kill(os.getpid(), job["signal"])

def crashes(job, report):
    ctypes.string_at(0)

def raises(job, report):
    raise ValueError("boom")

def refuses(job, report):
    from qtool.errors import InputError
    raise InputError("bad", where="file:3", hint="mend it")

def fails(job, report):
    from qtool.errors import QtoolError
    raise QtoolError("no", hint="try again")

def loses(job, report):
    from qtool.errors import WorkerDied
    raise WorkerDied("its helper has ended", hint="try again")

def leaves(job, report):
    sys.exit(job["code"])

def unspeakable(job, report):
    return {"value": object()}

def noisy(job, report):
    print('{"event": "result", "data": {"forged": true}}', flush=True)
    os.write(1, b"\\xff\\x00garbage\\n" * 10)
    for _ in range(job["megabytes"]):
        os.write(2, b"x" * 2**20)
    return {"fine": True}

def babbles(job, report):
    with report._lock:
        report._pipe.write(job["said"].encode() + b"\\n")
        report._pipe.flush()
    return {}

def large(job, report):
    return {"text": "x" * job["characters"]}

def works_long(job, report):
    report.item({"pid": os.getpid()})
    time.sleep(job["seconds"])
    return {}

def leaves_a_child(job, report):
    child = os.fork()
    if not child:
        time.sleep(1000)
    report.item({"pid": child})
    if job["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}

def hangs(job, report):
    if job.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        Path(job["started"]).write_text(str(os.getpid()))
        time.sleep(1000)
    finally:
        Path(job["started"] + ".cleaned").touch()
"""

PARENT = """
import json, sys
from qtool import workers
try:
    workers.run("misbehave", json.loads(sys.argv[1]), on_event=lambda event: None)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""

BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "misbehave.py").write_text(MODULE)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "qtool" / "log"


@pytest.fixture
def run(env: dict[str, str], logs: Path) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    def call(do: str, **job: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        result = workers.run("misbehave", {"do": do, **job}, on_event=events.append, env=env)
        assert events[0] == {"event": "status", "what": "starting"}
        return result, events[1:]

    return call


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds (a zombie that nobody reaps here counts as ended)."""
    for _ in range(100):
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def test_job_in_events_and_result_out(run: Any) -> None:
    job = {"text": "é\ud800\n", "number": 1.5, "big": "x" * 300_000}
    result, events = run("echo", **job)
    assert result == job
    assert events == [
        {"event": "progress", "stage": "stage", "done": 1, "total": 2, "unit": "layers"},
        {"event": "warning", "message": "careful"},
        {"event": "item", "data": {"i": 0}},
    ]


def test_the_worker_imports_nothing_but_the_standard_library_and_qtool(run: Any) -> None:
    result, _ = run("imported")
    packages = {name.partition(".")[0] for name in result["modules"]} - {"__main__", "__mp_main__"}
    startup = subprocess.check_output([sys.executable, "-c", "import sys; print(*sys.modules)"], text=True).split()
    assert packages - sys.stdlib_module_names - set(startup) == {"qtool", "misbehave"}
    assert "" not in result["path"]  # nothing in the current folder can stand in for a real module
    code = "import sys; print(*sys.path)"
    own = subprocess.check_output([sys.executable, "-P", "-c", code], env=BARE, text=True).split()
    assert not {str(folder) for folder in Path(workers.__file__).parents} & (set(result["path"]) - set(own))


def test_an_interpreter_of_its_own(run: Any, env: dict[str, str], tmp_path: Path, logs: Path) -> None:
    """Any interpreter does, whether qtool is installed in it or not: here one that sees no site-packages."""
    python = tmp_path / "bare-python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    result = workers.run("misbehave", {"do": "imported"}, python=str(python), on_event=lambda event: None, env=env)
    assert "qtool.workers" in result["modules"]
    with pytest.raises(QtoolError, match="cannot start the worker"):
        workers.run("misbehave", {}, python=str(tmp_path / "absent"), on_event=lambda event: None)


@pytest.mark.parametrize(
    ("do", "job", "message"),
    [
        ("killed", {"signal": signal.SIGKILL}, "killed by signal 9, most likely because memory ran out"),
        ("killed", {"signal": signal.SIGABRT}, "killed by signal 6 .SIGABRT."),
        ("crashes", {}, "killed by signal 11 .SIGSEGV."),
        ("raises", {}, "ValueError: boom"),
        ("fails", {}, "no"),
        ("leaves", {"code": 0}, "ended without a result .exit code 0."),
        ("leaves", {"code": 3}, "ended without a result .exit code 3."),
        ("unspeakable", {}, "not JSON serializable"),
    ],
)
def test_failures_name_a_log(run: Any, logs: Path, do: str, job: dict[str, Any], message: str) -> None:
    with pytest.raises(QtoolError, match=message) as caught:
        run(do, **job)
    assert caught.value.exit_code == 1
    (log,) = logs.iterdir()
    assert str(log) in (caught.value.hint or "")
    assert log.stat().st_mode & 0o777 == 0o600  # prompts may be in it
    if do in ("raises", "crashes"):
        assert "misbehave.py" in log.read_text()  # the traceback, of native crashes too


def test_input_errors_come_back_as_they_were(run: Any) -> None:
    with pytest.raises(InputError) as caught:
        run("refuses")
    assert (caught.value.what, caught.value.where, caught.value.hint) == ("bad", "file:3", "mend it")


def test_a_worker_can_say_that_it_is_as_good_as_dead(run: Any, logs: Path) -> None:
    with pytest.raises(WorkerDied, match="its helper has ended") as caught:
        run("loses")
    assert "try again" in (caught.value.hint or "")


def test_an_absent_module_is_an_error(logs: Path) -> None:
    with pytest.raises(QtoolError, match="No module named 'no_such_module'"):
        workers.run("no_such_module", {}, on_event=lambda event: None)


def test_chatter_goes_to_the_log(run: Any, logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result, events = run("noisy", megabytes=20)
    assert (result, events) == ({"fine": True}, [])
    assert capfd.readouterr() == ("", "")
    (log,) = logs.iterdir()
    assert log.stat().st_size > 20 * 2**20


@pytest.mark.parametrize("die", [False, True])
def test_children_of_a_worker_neither_hang_nor_outlive_it(run: Any, env: dict[str, str], logs: Path, die: bool) -> None:
    """A forked child keeps the pipe open."""
    events: list[dict[str, Any]] = []
    with pytest.raises(QtoolError, match="signal 9") if die else contextlib.nullcontext():
        workers.run("misbehave", {"do": "leaves_a_child", "die": die}, on_event=events.append, env=env)
    assert gone(events[1]["data"]["pid"])


def test_old_logs_are_removed(run: Any, logs: Path) -> None:
    for _ in range(workers.LOGS_KEPT + 3):
        run("echo")
    assert len(list(logs.iterdir())) == workers.LOGS_KEPT


def test_the_log_of_a_running_worker_stays(env: dict[str, str], logs: Path, tmp_path: Path) -> None:
    """However many others begin and end meanwhile; and goes its way afterwards."""
    parent, worker = start_parent(env, tmp_path)
    (log,) = logs.iterdir()
    for _ in range(workers.LOGS_KEPT + 3):
        workers.new_log("other")
    assert log.exists()
    parent.terminate()
    parent.communicate(timeout=60)
    assert gone(worker)
    workers.new_log("other")
    assert not log.exists()


def test_a_home_that_cannot_be_written_to(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert run("echo")[0] == {}


def test_what_the_handler_raises_stops_the_worker(env: dict[str, str], logs: Path) -> None:
    def refuse(event: dict[str, Any]) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        workers.run("misbehave", {"do": "echo"}, on_event=refuse, env=env)


def start_parent(env: dict[str, str], tmp_path: Path, **job: Any) -> tuple[subprocess.Popen[str], int]:
    """A process of its own that waits for a hanging worker; and the worker's id."""
    started = tmp_path / "started"
    job = {"do": "hangs", "started": str(started), **job}
    root = str(Path(workers.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(job)],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": f"{env['PYTHONPATH']}:{root}"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (started.exists() and started.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    return parent, int(started.read_text())


@pytest.mark.parametrize("stubborn", [False, True])
def test_interrupt_stops_the_worker(env: dict[str, str], tmp_path: Path, stubborn: bool) -> None:
    """Ctrl-C in a terminal: SIGINT to the whole foreground group. A worker that won't stop is killed after a while."""
    parent, worker = start_parent(env, tmp_path, stubborn=stubborn)
    os.killpg(parent.pid, signal.SIGINT)
    output, _ = parent.communicate(timeout=60)
    assert (parent.returncode, output) == (130, "interrupted\n")
    assert gone(worker)
    assert (tmp_path / "started.cleaned").exists() is not stubborn


def test_termination_lets_the_worker_clean_up(env: dict[str, str], tmp_path: Path) -> None:
    parent, worker = start_parent(env, tmp_path)
    parent.terminate()
    parent.communicate(timeout=60)
    assert parent.returncode == 128 + signal.SIGTERM
    assert gone(worker)
    assert (tmp_path / "started.cleaned").exists()


def test_a_killed_parent_takes_the_worker_with_it(env: dict[str, str], tmp_path: Path) -> None:
    parent, worker = start_parent(env, tmp_path, stubborn=True)
    parent.kill()
    parent.communicate(timeout=60)
    assert gone(worker)


def test_a_worker_that_takes_too_long_is_stopped(run: Any, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    python.chmod(0o755)
    with pytest.raises(QtoolError, match=r"no answer within 0\.5 seconds"):
        workers.run("misbehave", {}, python=str(python), on_event=lambda event: None, timeout=0.5)
    assert gone(int((tmp_path / "pid").read_text()))


def test_hidden_packages_look_absent() -> None:
    code = """
import importlib
from qtool import workers
from qtool.environments import lookup
workers.hide_media_packages()
for package in ("torchaudio", "torchcodec", "torchvision"):
    assert not lookup.available(package)
    try:
        importlib.import_module(package)
    except ImportError as error:
        print("hidden" if "None in sys.modules" in str(error) else error)
"""
    root = str(Path(workers.__file__).parents[2])
    output = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, text=True)
    assert output.split() == ["hidden"] * 3


@pytest.mark.parametrize(
    ("torch", "torchvision", "wants", "kept"),
    [
        ("2.13.0+cu130", "0.28.0+cu130", "torch (==2.13.0)", True),
        ("2.13.0", "0.28.0", "torch==2.13.0", True),
        ("2.13.0+cpu", "0.28.0+cu130", "torch (==2.13.0)", False),
        ("2.14.0+cu130", "0.28.0+cu130", "torch (==2.13.0)", False),
        ("2.13.0+cpu", None, "", False),
    ],
)
def test_torchvision_can_stay_where_it_was_built_for_this_torch(
    torch: str, torchvision: str | None, wants: str, kept: bool, tmp_path: Path
) -> None:
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        if version is None:
            continue
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "version.py").write_text(f"__version__ = '{version}'\n")
        about = tmp_path / f"{name}-{version.partition('+')[0]}.dist-info"
        about.mkdir()
        required = f"Requires-Dist: {wants}\n" if name == "torchvision" else ""
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
    code = """
import sys
from qtool import workers
workers.hide_media_packages(keep_torchvision=True)
print(*[name in sys.modules for name in ("torchaudio", "torchcodec", "torchvision", "torch")])
"""
    path = os.pathsep.join([str(tmp_path), str(Path(workers.__file__).parents[2])])
    output = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, text=True)
    assert output.split() == ["True", "True", str(not kept), "False"]


def test_a_worker_that_says_nonsense(run: Any, logs: Path) -> None:
    for said, shown in (
        ('nonsense "é"', r"\xe9"),
        ('{"event": "result"}', "result"),
        ("x" * 70_000_000, "'" + "x" * 100 + "', 70.0 MB"),
    ):
        with pytest.raises(QtoolError, match="sent something that is not an event: ") as caught:
            run("babbles", said=said)
        assert shown in caught.value.what
        assert len(caught.value.what) < 200
        assert Path((caught.value.hint or "").rpartition(": ")[2]) in set(logs.iterdir())


def test_a_large_result(run: Any) -> None:
    result, _ = run("large", characters=60_000_000)
    assert len(result["text"]) == 60_000_000


def test_a_stopped_worker_is_told_of(
    env: dict[str, str], logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_side, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(parent_side, "BEAT_SECONDS", 0.1)
    events: list[dict[str, Any]] = []
    stopped: list[int] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "item":
            stopped.append(event["data"]["pid"])
            os.kill(stopped[0], signal.SIGSTOP)
        elif event["event"] != "status":
            events.append(event)
            if len(events) == 2:
                os.kill(stopped[0], signal.SIGCONT)

    assert workers.run("misbehave", {"do": "works_long", "seconds": 2}, on_event=hear, env=env) == {}
    assert [event["event"] for event in events] == ["warning", "warning"]  # while it ran there was none
    for event in events:
        assert f"no message from the worker (process {stopped[0]}) for" in event["message"]
        assert f"kill -CONT {stopped[0]}" in event["message"]


def test_a_worker_without_a_voice_is_told_of(env: dict[str, str], logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code that holds the interpreter's lock, for example."""
    monkeypatch.setattr(parent_side, "SILENCE_SECONDS", 0.3)
    events: list[dict[str, Any]] = []
    workers.run("misbehave", {"do": "works_long", "seconds": 1.5}, on_event=events.append, env=env)
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert 1 <= len(warnings) < 8  # each after twice as long
    assert str(next(iter(logs.iterdir()))) in warnings[0]


def test_a_signal_without_a_name(run: Any) -> None:
    with pytest.raises(WorkerDied, match=r"killed by signal 40$"):
        run("killed", signal=40)
