"""Every interpreter that qtool starts, in a folder with a torch.py, a vllm.py and a json.py of a stranger's."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("torch", "vllm", "json", "mindspore", "numpy", "yaml", "runpy", "encodings")
POISON = "import os\nwith open(os.environ['POISONED'], 'a') as file:\n    print(__file__, file=file)\n"

PACKAGES = (
    *("vllm", "vllm/entrypoints", "vllm/entrypoints/openai"),
    *("mindspore", "mindspore/parallel", "mindspore/parallel/cluster"),
)

ENGINE = """
import multiprocessing, subprocess, sys

def here(_):
    import json, importlib.util
    specs = [importlib.util.find_spec(name) for name in ("torch", "yaml")]
    return [json.__file__, sys.flags.safe_path, *(spec and spec.origin for spec in specs)]

def main(job, report):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.map(here, [0])[0]
    subprocess.run([sys.executable, "-m", "json.tool", "--help"], check=True)
    subprocess.run([sys.executable, "-c", "import json, torch"], check=True)
    return {"here": here(0), "spawned": spawned}
"""
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

found = [json.__file__, __file__, sys.flags.safe_path, os.environ.get("PYTHONPATH"), sys.path]
with open(os.path.join(os.environ["XDG_STATE_HOME"], "server.json"), "w") as file:
    json.dump(found, file)

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).handle_request()
"""
MSRUN = """
import json, sys
with open("events.jsonl", "a") as file:
    print(json.dumps({"event": "result", "data": {"json": json.__file__, "safe": sys.flags.safe_path}}), file=file)
"""


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs Python code in the folder of a model in which somebody put modules; what it prints, from JSON."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        shutil.copyfile(file, folder / file.name)
    for name in NAMES:
        (folder / f"{name}.py").write_text(POISON)
    modules = tmp_path / "modules"
    for name, text in (
        ("engine.py", ENGINE),
        *((f"{package}/__init__.py", "") for package in PACKAGES),
        ("vllm/entrypoints/openai/api_server.py", SERVER),
        ("mindspore/parallel/cluster/run.py", MSRUN),
        ("torch.py", ""),
    ):
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_text(text)
    poisoned = tmp_path / "poisoned"

    def call(*arguments: str, engines: Path = modules) -> Any:
        env = {
            **os.environ,
            "PYTHONPATH": f"{engines}:{ROOT}:",  # as `export PYTHONPATH=…:$PYTHONPATH` leaves it
            "POISONED": str(poisoned),
            "XDG_STATE_HOME": str(tmp_path),
        }
        start = "import sys; sys.path[:] = [folder for folder in sys.path if folder != sys.argv[1]]; del sys.argv[1]"
        first = [sys.executable, "-I", "-c", f"{start}; sys.path.insert(0, {str(ROOT)!r}); {arguments[0]}"]
        command = [*first, str(folder), *arguments[1:]]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert not poisoned.exists(), poisoned.read_text()
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None

    return call


def is_real(file: str) -> bool:
    return file == json.__file__


def test_a_worker_and_what_it_starts(run: Any) -> None:
    code = "from qtool import workers; import json; print(json.dumps(workers.run('engine', {}, on_event=print)))"
    found = run(code)
    for place in ("here", "spawned"):
        file, safe, torch, _ = found[place]
        assert is_real(file)
        assert safe
        assert "modules" in torch


def test_a_command_and_its_guard(run: Any) -> None:
    code = "from qtool.workers import commands; print(commands.run(['true'], on_line=print))"
    assert run(code) == 0


def test_what_an_environment_is_made_with(run: Any, tmp_path: Path) -> None:
    code = "; ".join(
        [
            "from qtool.environments import install",
            "from pathlib import Path",
            "from qtool.environments.installers import Pip",
            "from qtool.workers import commands",
            "base = install._probe(sys.executable)",
            "assert base and base.has_venv",
            "pip = Pip().command(Path(sys.executable), Path('/dev/null'), [])",
            "print(commands.run(pip, on_line=lambda line: None))",
        ]
    )
    assert run(code) == 0


def test_a_server(run: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # What `serve` prints is no JSON.
    code = "from qtool.cli.app import run; code = run(sys.argv[1:]); print('\\nnull'); sys.exit(code)"
    run(code, "serve", ".", "--runtime", "vllm", "--quiet", "--port", port)
    file, server, safe, path, folders = json.loads((tmp_path / "server.json").read_text())
    assert is_real(file)
    assert "modules/vllm" in server
    assert safe
    assert "" not in path.split(":")
    assert "" not in folders


def test_a_helper_with_limits(run: Any) -> None:
    """It has `json` for itself, and nobody else's."""
    code = "from qtool import patterns; print(str(patterns.search('(a+)+b', 'a' * 40 + 'b', 'here')).lower())"
    assert run(code) is True


def test_several_cards(run: Any, tmp_path: Path) -> None:
    code = "; ".join(
        [
            "from qtool.engines.golden_stick import launch, tasks",
            "import dataclasses, json",
            "start = tasks.CardsLaunch(yaml='', msrun=['msrun'])",
            "rest = {'policies': [], 'ids': [], 'seed': 0, 'output': '', 'model': ''}",
            "job = dataclasses.asdict(tasks.CalibrateTask(**rest, scratch=sys.argv[1], launch=start))",
            "report = type('Report', (), {'progress': lambda *_: None})()",
            "print(json.dumps(launch.main(job, report)))",
        ]
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "json.py").write_text(POISON)
    found = run(code, str(scratch))
    assert is_real(found["json"])
    assert found["safe"]


@pytest.mark.slow
def test_a_ray_cluster(run: Any, tmp_path: Path) -> None:
    """Ray tells its workers the folder that whoever starts it is in."""
    code = "from qtool.cli.app import run; sys.exit(run(sys.argv[1:]))"
    options = ("--ray", "local", "--samples", "2", "--seq-len", "16", "--json", "--quiet")
    found = run(code, "quantize", ".", "-o", str(tmp_path / "out"), *options, engines=tmp_path)
    assert Path(found["output"]).name == "out"


STARTS = {"subprocess", "multiprocessing", "pty", "ray"}
MAY = {
    "qtool/engines/golden_stick/engine.py": "asks an interpreter of golden-stick, which is isolated, what it has",
    "qtool/engines/golden_stick/launch.py": "test_several_cards",
    "qtool/engines/native/executor.py": "test_a_worker_and_what_it_starts",
    "qtool/environments/install.py": "test_what_an_environment_is_made_with",
    "qtool/runtimes/remote.py": "starts what runtimes/nodes.py says, on hosts of the user's: ssh, ray, the server",
    "qtool/runtimes/serving.py": "test_a_server",
    "qtool/workers/commands.py": "test_a_command_and_its_guard",
    "qtool/workers/guard.py": "test_a_command_and_its_guard",
    "qtool/workers/leash.py": "test_a_server",
    "qtool/workers/limited.py": "test_a_helper_with_limits",
    "qtool/workers/processes.py": "test_a_worker_and_what_it_starts",
}


def test_a_python_is_started_in_one_way_only() -> None:
    """Wherever `-m` or `-c` stands, it is an argument of what adds `-P` or `-I`."""
    found = []
    for file in (ROOT / "qtool").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
            if any(isinstance(part, ast.Constant) and part.value in ("-m", "-c") for part in parts):
                name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else None
                if name not in ("python", "isolated_python", "_interpreter"):
                    found.append(f"{file}:{node.lineno}")  # type: ignore[attr-defined]
    assert found == []


def test_nothing_else_starts_processes() -> None:
    """Whoever starts one elsewhere adds a test above."""
    found = set()
    for file in (ROOT / "qtool").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                starts = node.attr.startswith(("exec", "spawn", "posix_spawn", "popen", "system", "fork"))
                names = {"subprocess"} if starts else set()
            else:
                continue
            if names & STARTS:
                found.add(file.relative_to(ROOT).as_posix())
    assert found == set(MAY)
