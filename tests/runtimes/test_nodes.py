"""Servers over several hosts: the file of hosts, what runs on each of them, and that it does."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError, QtoolError
from qtool.runtimes import nodes, remote, server
from qtool.runtimes.launch import Launch
from qtool.runtimes.nodes import Node, Step

TWO = [Node("192.10.10.10", 8, "enp189s0f0", "192.10.10.10"), Node("192.10.10.11", 8, "enp189s0f0", "192.10.10.11")]


def test_a_file_of_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text("# the head\n192.10.10.10 interface=eth0\n\nnode-b cards=4 login=me@node-b.local  # ours\n")
    assert nodes.read(file) == [
        Node("192.10.10.10", 8, "eth0", "192.10.10.10"),
        Node("node-b", 4, None, "me@node-b.local"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names 0 hosts"),
        ("a\n", "names 1 hosts"),
        ("a\na cards=4\n", "a is there twice"),
        ("a\nb cards=0\n", "no number of cards"),
        ("a\nb cards=many\n", "no number of cards"),
        ("a\nb gpus=4\n", "'gpus=4' is not understood"),
        ("a\nb cards=4 cards=8\n", "not understood"),
        ("-oProxyCommand=x\nb\n", "is no address"),
        ("a\nb login=-oProxyCommand=x\n", "not USER@HOST"),
        ("a\nb interface=$(id)\n", "no name of one"),
        ("a\n$(id)\n", "is no address"),
    ],
)
def test_bad_files(text: str, words: str, run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text(text)
    done = run_qtool("serve", tiny_llama, "--nodes", tmp_path / "hosts.txt", "--dry-run")
    assert (done.code, done.stdout) == (2, "")
    assert words in done.stderr
    assert "hosts.txt" in done.stderr


def test_no_file(run_qtool: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    done = run_qtool("serve", tiny_llama, "--nodes", tmp_path / "nowhere.txt", "--dry-run")
    assert (done.code, "can't be read" in done.stderr) == (2, True)


@pytest.fixture
def deepseek(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint that says it is DeepSeek-V3, and vLLM-MindSpore where nothing of it is installed."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "DeepSeek-R1-W8A8"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "deepseek_v3", "n_routed_experts": 256, "architectures": ["DeepseekV3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for module in (nodes, server):
        monkeypatch.setattr(module, "choose", lambda *_, **__: Launch("vllm-mindspore", "/opt/python", {}, {}))
    return Checkpoint.open(folder)


def planned(checkpoint: Checkpoint, hosts: list[Node], **arguments: Any) -> list[Step]:
    return nodes.plan(checkpoint, "auto", arguments, {"port": 8000}, hosts)


def option(step: Step, name: str) -> str:
    return step.command[step.command.index(name) + 1]


def test_hybrid_as_in_the_guide(deepseek: Checkpoint) -> None:
    """DP4-EP4-TP4 on 2 x 8 cards by processes: vLLM-MindSpore's guide has these very options."""
    engine, serve = planned(deepseek, TWO, tensor_parallel_size=4)
    assert (engine.kind, engine.node, serve.kind, serve.node) == ("engine", TWO[1], "serve", TWO[0])
    for step, rank in ((serve, "0"), (engine, "2")):
        assert step.command[1:].index("vllm_mindspore.scripts") >= 0
        assert option(step, "--tensor-parallel-size") == option(step, "--data-parallel-size") == "4"
        assert option(step, "--data-parallel-size-local") == "2"
        assert option(step, "--data-parallel-start-rank") == rank
        assert option(step, "--data-parallel-address") == "192.10.10.10"
        assert option(step, "--data-parallel-rpc-port") == "12370"
        assert json.loads(option(step, "--additional-config")) == {"expert_parallel": 4}
        assert "--enable-expert-parallel" in step.command
        assert ("--headless" in step.command) == (step is engine)
        assert step.env["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert step.env["GLOO_SOCKET_IFNAME"] == step.env["HCCL_SOCKET_IFNAME"] == "enp189s0f0"
        assert step.env["MS_ENABLE_LCCL"] == "off"
        assert step.env["HCCL_OP_EXPANSION_MODE"] == "AIV"
        assert step.env["VLLM_MS_MODEL_BACKEND"] == "mindformers"


def test_tensor_parallel_through_ray(deepseek: Checkpoint) -> None:
    """TP16 on 2 x 8 cards, as the recipe says."""
    head, worker, serve = planned(deepseek, TWO)
    assert [step.kind for step in (head, worker, serve)] == ["ray", "ray", "serve"]
    assert head.command[-4:] == ("start", "--head", "--node-ip-address=192.10.10.10", "--port=6379")
    assert "--address=192.10.10.10:6379" in worker.command
    assert (worker.node, serve.node) == (TWO[1], TWO[0])
    assert option(serve, "--tensor-parallel-size") == "16"
    assert option(serve, "--distributed-executor-backend") == "ray"
    assert head.env["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] == "python"


def test_four_hosts(deepseek: Checkpoint) -> None:
    """4 x 8 cards: two copies of 16 through Ray, or eight of 4 by processes."""
    four = [Node(f"10.0.0.{i}", 8, None, f"10.0.0.{i}") for i in range(4)]
    steps = planned(deepseek, four)
    assert [step.kind for step in steps] == ["ray"] * 4 + ["serve"]
    assert option(steps[-1], "--data-parallel-backend") == "ray"
    assert {(step.command[1], step.env["PYTHONSAFEPATH"]) for step in steps} == {("-P", "1")}
    assert (option(steps[-1], "--tensor-parallel-size"), option(steps[-1], "--data-parallel-size")) == ("16", "2")
    steps = planned(deepseek, four, tensor_parallel_size=4)
    assert [step.kind for step in steps] == ["engine"] * 3 + ["serve"]
    assert [option(step, "--data-parallel-start-rank") for step in (steps[-1], *steps[:-1])] == ["0", "2", "4", "6"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_parallel_size": 3}, "3 cards for each of 5 copies"),
        ({"tensor_parallel_size": 32}, "the hosts have 16"),
        ({"tensor_parallel_size": 4, "data_parallel_size": 2}, "are 8, the hosts have 16"),
        ({"tensor_parallel_size": "x"}, "expected a number"),
        ({"tensor_parallel_size": 0}, "expected a number"),
        ({"api_key": "secret"}, "command lines"),
        ({"HF_TOKEN": "secret"}, "command lines"),
    ],
)
def test_what_does_not_fit(deepseek: Checkpoint, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(deepseek, TWO, **arguments)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for ssh: does the command here, and notes where it would have been done."""
    folder = tmp_path / "bin"
    folder.mkdir()
    notes = tmp_path / "notes"
    program = folder / "ssh"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "host, command = sys.argv[sys.argv.index('--') + 1:]\n"
        "if host == 'away': print('ssh: connect to host away: No route to host', file=sys.stderr); sys.exit(255)\n"
        f"with open({str(notes)!r}, 'a') as file: file.write(f'{{host}} {{command}}\\n')\n"
        "os.execv('/bin/sh', ['/bin/sh', '-c', 'exec ' + command])\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return notes


def script(tmp_path: Path, name: str, code: str) -> tuple[str, ...]:
    (tmp_path / name).write_text(code)
    return (sys.executable, str(tmp_path / name))


def test_it_runs_and_ends_together(ssh: Path, tmp_path: Path) -> None:
    """The server waits for the engine on the other host, and ends; then the engine is ended and Ray stopped."""
    here, there = Node("127.0.0.1", login="127.0.0.1"), Node("203.0.113.1", login="me@there")
    waits = "import time, pathlib\nwhile not pathlib.Path({0!r}).exists(): time.sleep(0.01)\nraise SystemExit(7)"
    flag, pid = tmp_path / "flag", tmp_path / "pid"
    engine = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()));"
        f"pathlib.Path({str(flag)!r}).write_text(os.environ['SAID']); time.sleep(600)"
    )
    ray = script(tmp_path, "ray.py", f"import sys; open({str(tmp_path / 'ray')!r}, 'a').write(sys.argv[1] + ' ')")
    steps = [
        Step(here, "ray", (*ray, "start", "--head"), {}),
        Step(there, "ray", (*ray, "start", "--address=x"), {}),
        Step(there, "engine", script(tmp_path, "engine.py", engine), {"SAID": "a b"}),
        Step(here, "serve", script(tmp_path, "serve.py", waits.format(str(flag))), {}),
    ]
    said: list[str] = []
    assert remote.run(steps, said.append) == 7
    assert flag.read_text() == "a b"
    assert (tmp_path / "ray").read_text().split() == ["start", "start", "stop", "stop"]
    assert "me@there env 'SAID=a b' " in ssh.read_text()
    assert said[0] == "127.0.0.1: start Ray"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_an_engine_that_ends_is_told(ssh: Path, tmp_path: Path) -> None:
    here, there = Node("127.0.0.1", login="127.0.0.1"), Node("203.0.113.1", login="there")
    steps = [
        Step(there, "engine", script(tmp_path, "engine.py", "raise SystemExit(3)"), {}),
        Step(here, "serve", script(tmp_path, "serve.py", "import time; time.sleep(600)"), {}),
    ]
    with pytest.raises(QtoolError, match="an engine has ended: exit code 3"):
        remote.run(steps, lambda _: None)


def test_a_host_out_of_reach_is_found_before_anything_starts(ssh: Path, tmp_path: Path) -> None:
    here, away = Node("127.0.0.1", login="127.0.0.1"), Node("203.0.113.2", login="away")
    touched = tmp_path / "touched"
    serve = script(tmp_path, "serve.py", f"open({str(touched)!r}, 'w')")
    with pytest.raises(QtoolError, match="No route to host"):
        remote.run([Step(away, "engine", ("true",), {}), Step(here, "serve", serve, {})], lambda _: None)
    assert not touched.exists()
