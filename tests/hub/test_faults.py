"""Bad links and bad servers: afterwards there is a verified folder or a clear error, never a wrong file that passes.

Each kind of fault strikes 20 downloads at random places; `fault_table.py` does all of it through the command line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub import fault_table
from tests.hub.fixtures import IMPATIENT, Hub, contents, model_files, wanted
from tests.hub.loopback import FOREVER, Fault, Repo
from tests.managed import REPOSITORY

pytestmark = pytest.mark.slow

RUNS = 20
SHARD = "model-00001-of-00002.safetensors"


def test_faults_at_random_places(hub: Hub, tmp_path: Path) -> None:
    """Per kind a repository of 20 files, each struck; what can't end well stops the rest, so 20 repositories."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    truth: dict[str, dict[str, bytes]] = {}
    for kind, make in fault_table.FAULTS.items():
        name = kind.replace(" ", "-")
        groups = [range(1)] * RUNS if name in fault_table.PERMANENT else [range(RUNS)]
        for number, group in enumerate(groups):
            repo = f"org/{name}-{number}"
            truth[repo] = {f"{i}.safetensors": rng.randbytes(rng.randrange(1, 200_000)) for i in group}
            hub.server.repos[repo] = Repo(truth[repo])
            for path, data in truth[repo].items():
                hub.server.faults[f"{repo}/{path}"] = make(rng, len(data))
    hub.server.page_size = 100
    jobs = [{"repo": repo, "folder": str(tmp_path / repo)} for repo in truth]
    done = subprocess.run(
        [hub.env.get("QTOOL_OPENMIND_HUB_PYTHON", sys.executable), "-m", "tests.hub.fetch_many"],
        input=json.dumps({"hub": hub.name, "jobs": jobs}),
        env={**os.environ, **hub.env, **IMPATIENT, "PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for (repo, files), (first, second) in zip(truth.items(), json.loads(done.stdout), strict=True):
        found = contents(tmp_path / repo / "complete")
        assert found.items() <= files.items(), repo  # whatever has its place and name is right
        words = fault_table.PERMANENT.get(repo.removeprefix("org/").rpartition("-")[0])
        if words:
            assert words in first, repo
            assert words in second, repo
        else:
            assert (found, second) == (files, ""), repo


def test_killed_at_random_moments(hub: Hub, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    files = model_files()
    hub.server.repos["org/model"] = Repo(files)
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("slow", times=FOREVER)]
    command = [sys.executable, "-m", "qtool", "download", "org/model", "--from", hub.name]
    env = {**os.environ, **hub.env, "PYTHONPATH": str(REPOSITORY)}
    kept = []
    for _ in range(4):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        places = (tmp_path / "model", *(tmp_path / ".model.partial" / name for name in ("complete", "incomplete")))
        came = (file for place in places for file in place.rglob("*") if file.is_file())
        kept.append(sum(file.stat().st_size for file in came))
        if (tmp_path / "model").exists():
            assert contents(tmp_path / "model") == wanted(files)
    assert kept == sorted(kept)  # nothing that came is lost
    done = hub.download("org/model", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert contents(tmp_path / "model") == wanted(files)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    files = model_files()
    hub.server.repos["org/model"] = Repo(files)
    script = f"ulimit -f 600; exec {sys.executable} -m qtool download org/model --from {hub.name}"  # blocks of 1 kB
    env = {**os.environ, **hub.env, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "no space left" in done.stderr
    assert "continues where it stopped" in done.stderr
    assert not (tmp_path / "model").exists()
    assert hub.download("org/model", cwd=tmp_path).code == 0
    assert contents(tmp_path / "model") == wanted(files)


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_a_server_that_goes_and_comes_back(huggingface: Hub, tmp_path: Path, seconds: float) -> None:
    assert fault_table.gone_and_back(huggingface, tmp_path, random.Random(0), seconds) == ("verified", "verified")
