"""Long jobs on the command line: killed anywhere, continued, and as right as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import Launcher

Run = Callable[..., Any]
FAST = ("--runtime", "transformers", "--max-tokens", "3")
SAMPLED = (*FAST, "--temperature", "1", "--seed", "5")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = ({"id": i, "prompt": f"{'word ' * (i % 5)}number {i}"} for i in range(400))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def expected(run_qtool: Run, tiny_llama: Path, prompts: Path) -> str:
    """What a run gives that nothing happens to."""
    done = run_qtool("generate", tiny_llama, "-p", f"@{prompts}", *SAMPLED)
    assert done.code == 0, done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == list(range(400))
    return str(done.stdout)


def test_killed_at_random_and_resumed(
    qtool_environment: dict[str, str],
    launcher: Launcher,
    tiny_llama: Path,
    prompts: Path,
    expected: str,
    tmp_path: Path,
) -> None:
    """Each kill strikes once some more answers are there: the whole process, or its worker, which is replaced."""
    output = tmp_path / "answers.jsonl"
    command = ["generate", str(tiny_llama), "-p", f"@{prompts}", *SAMPLED]
    command += ["--output", str(output), "--resume"]
    rng = random.Random(0)
    for victim in ("parent", "worker", "parent", "worker"):
        with launcher.start(command, env=qtool_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            _grown(output, process, rng.randrange(1, 4000))
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if victim == "parent":
                process.kill()
                continue
            os.kill(int(children[0]), signal.SIGKILL)
            _grown(output, process, 1000)
            process.kill()
    done = launcher.run(command, env=qtool_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    assert output.read_text() == expected
    assert list(tmp_path.iterdir()) == [output]


def _grown(file: Path, process: subprocess.Popen[bytes], size: int) -> None:
    """Wait until so many more bytes are in the file."""
    before = file.stat().st_size if file.exists() else 0
    while not file.exists() or file.stat().st_size < before + size:
        assert process.poll() is None
        time.sleep(0.001)


def test_a_worker_that_is_killed_is_replaced(
    qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path, prompts: Path, expected: str
) -> None:
    command = ["generate", str(tiny_llama), "-p", "@-", *SAMPLED]
    pipe, lines = subprocess.PIPE, prompts.read_text().splitlines(keepends=True)
    with launcher.start(command, env=qtool_environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(lines[:200]))
        process.stdin.flush()
        first = process.stdout.readline()
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        rest, errors = process.communicate("".join(lines[200:]), timeout=120)
    assert process.returncode == 0, errors
    assert "another worker continues" in errors
    assert first + rest == expected


def test_a_disk_that_is_full_is_told_and_can_be_mended(
    qtool_environment: dict[str, str],
    launcher: Launcher,
    tiny_llama: Path,
    prompts: Path,
    expected: str,
    tmp_path: Path,
) -> None:
    """Files that may not grow beyond a limit stand for the disk."""
    output = tmp_path / "answers.jsonl"
    command = ["generate", str(tiny_llama), "-p", f"@{prompts}", *SAMPLED]
    command += ["--output", str(output), "--resume"]

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        most = (limit, resource.RLIM_INFINITY)
        return launcher.run(
            command,
            env=qtool_environment,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most),
        )

    for limit, file in ((10_000, output), (100, tmp_path / ".answers.jsonl.qtool.json")):
        done = run(limit)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"the size limit for files (ulimit -f) is reached\n  at: {file}\n" in done.stderr
        assert "bug" not in done.stderr
    done = run(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == expected


def test_other_settings_are_not_mixed_in(run_qtool: Run, tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    asked = ("generate", tiny_llama, *FAST, "-p", "a", "-p", "b", "-o", output)
    assert run_qtool(*asked).code == 0
    assert run_qtool(*asked).code == 2  # it is there
    done = run_qtool(*asked, "--resume")
    assert (done.code, done.stdout) == (0, f"{output}\n")
    assert "2 prompts are already answered" in done.stderr
    assert "load the model" not in done.stderr
    output.write_text(output.read_text().splitlines(keepends=True)[0])
    (tmp_path / ".answers.jsonl.qtool.json").write_text('{"sampling": {"temperature": 0.7}}')
    done = run_qtool(*asked, "--resume")
    assert done.code == 2
    assert "sampling" in done.stderr
    done = run_qtool("generate", tiny_llama, *FAST, "-p", "x", "-o", output, "--resume")
    assert done.code == 2
    assert "not an answer to prompt 1" in done.stderr


@pytest.mark.vllm
def test_with_other_memory_a_job_goes_on(
    qtool_environment: dict[str, str], launcher: Launcher, run_qtool: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    """After a kill; but not with what decides about the answers."""
    output = tmp_path / "answers.jsonl"
    asked = ("generate", str(tiny_llama), "--runtime", "vllm", "--max-tokens", "3", "-o", str(output))
    command = [*asked, "--set", "max_num_seqs=4"]
    pipe = subprocess.PIPE
    with launcher.start(command, env=qtool_environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        process.stdin.write(b"a\n")
        process.stdin.flush()
        _grown(output, process, 1)
        process.kill()
    both = (*asked, "-p", "a", "-p", "b", "--resume")
    refused = run_qtool(*both, "--set", "dtype=float16")
    assert refused.code == 2
    assert "another arguments" in refused.stderr
    done = run_qtool(*both, "--set", "max_num_seqs=2")
    assert done.code == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["a", "b"]


@pytest.mark.vllm
def test_where_memory_runs_out_the_way_on_is_told(
    qtool_environment: dict[str, str], launcher: Launcher, run_qtool: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    """Both workers are killed before there is an answer; the same command can be run again then."""
    output = tmp_path / "answers.jsonl"
    asked = ("generate", str(tiny_llama), "-p", "a", "-o", str(output))
    command = [*asked, "--runtime", "vllm"]
    with launcher.start(command, env=qtool_environment, stderr=subprocess.PIPE, text=True) as process:
        killed: list[str] = []
        for _ in range(2):
            while (child := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()) in (
                [],
                killed,
            ):
                assert process.poll() is None
                time.sleep(0.01)
            os.kill(int(child[0]), signal.SIGKILL)
            killed = child
        _, rest = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "memory ran out" in rest
    assert "--set max_num_seqs=" in rest
    assert output.read_text() == ""
    assert run_qtool(*asked, *FAST).code == 0


@pytest.mark.vllm
def test_an_engine_that_is_killed_is_replaced(
    qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path
) -> None:
    """Where vLLM's engine is a process of its own, between two prompts."""
    own = ("VLLM_ENABLE_V1_MULTIPROCESSING=1", "kv_cache_memory_bytes=100000000", "max_num_seqs=4")
    command = ["generate", str(tiny_llama), "--runtime", "vllm", "--max-tokens", "3"]
    command += [f"--set={setting}" for setting in own]
    pipe = subprocess.PIPE
    with launcher.start(command, env=qtool_environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("a\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["prompt"] == "a"
        (engine,) = [pid for pid in _below(process.pid) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(engine, signal.SIGKILL)
        rest, errors = process.communicate("b\n", timeout=240)
    assert process.returncode == 0, errors
    assert json.loads(rest)["prompt"] == "b"
    assert "another worker continues" in errors


def _below(pid: int) -> list[int]:
    """The process's children, and theirs."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return children + [below for child in children for below in _below(child)]


def test_answers_come_before_the_prompts_end(
    qtool_environment: dict[str, str], launcher: Launcher, tiny_llama: Path
) -> None:
    """One prompt at a time through a pipe that stays open."""
    command = ["generate", str(tiny_llama), *FAST, "--quiet"]
    pipe = subprocess.PIPE
    with launcher.start(command, env=qtool_environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for prompt in ("a", "b", "c"):
            process.stdin.write(f"{prompt}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["prompt"] == prompt
        process.stdin.close()
        assert process.wait(60) == 0
