"""Fixtures for everything that talks to a hub: servers on loopback, a repository, and openmind-hub's interpreter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.hub import loopback
from tests.hub.loopback import LoopbackServer, Repo
from tests.managed import managed_python

IMPATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "DEFAULT_REQUEST_TIMEOUT": "2"}  # seconds of silence
TOKEN = "tok_3nTh1s1sS3cr3t"


@dataclass
class Hub:
    """A hub under test: its server, and how qtool gets there."""

    name: str
    server: LoopbackServer
    env: dict[str, str]
    run: Callable[..., Any]

    def download(self, *args: str | Path, cwd: Path, **env: str) -> Any:
        """`qtool download ARGS --from` this hub, run in `cwd`."""
        return self.run("download", *args, "--from", self.name, cwd=cwd, env={**self.env, **env})

    @property
    def token(self) -> dict[str, str]:
        """The variable that gives qtool the token."""
        return {"huggingface": {"HF_TOKEN": TOKEN}, "modelers": {"OPENMIND_HUB_TOKEN": TOKEN}}[self.name]


@pytest.fixture(scope="session")
def openmind_python() -> str:
    """An interpreter that has openmind-hub."""
    return managed_python("openmind-hub")


@contextlib.contextmanager
def huggingface_server() -> Iterator[tuple[LoopbackServer, dict[str, str]]]:
    with contextlib.contextmanager(loopback.serve_huggingface)() as server:
        server.tokens.add(TOKEN)
        yield server, {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}


@contextlib.contextmanager
def modelers_server(folder: Path) -> Iterator[tuple[LoopbackServer, dict[str, str]]]:
    with contextlib.contextmanager(loopback.serve_modelers)(folder) as (server, env):
        server.tokens.add(TOKEN)
        yield server, {**env, "QTOOL_OPENMIND_HUB_PYTHON": managed_python("openmind-hub"), "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def huggingface(run_qtool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    home = tmp_path_factory.mktemp("hf-home")
    with huggingface_server() as (server, env):
        yield Hub("huggingface", server, env | {"HF_HOME": str(home)}, run_qtool)


@pytest.fixture
def modelers(run_qtool: Any, openmind_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with modelers_server(tmp_path_factory.mktemp("certificates")) as (server, env):
        yield Hub("modelers", server, env, run_qtool)


@pytest.fixture(params=["huggingface", "modelers"])
def hub(request: pytest.FixtureRequest) -> Hub:
    """Each hub in turn."""
    return request.getfixturevalue(request.param)


def model_files(seed: int = 0, elements: int = 500_000) -> dict[str, bytes]:
    """What a small model's repository holds: two shards with an index, and what nobody needs beside them."""
    rng = np.random.default_rng(seed)
    shards = {
        f"model-0000{i}-of-00002.safetensors": {f"layer.{i}": rng.standard_normal(elements).astype(np.float32)}
        for i in (1, 2)
    }
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# A model\n",
        "config.json": b'{"model_type": "llama"}\n',
        "additional/deep/settings.json": b"{}",
        **{shard: safetensors.numpy.save(tensors) for shard, tensors in shards.items()},
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "pytorch_model.bin": b"a pickle",
        "optimizer.pt": b"another",
        "onnx/model.onnx": b"onnx",
    }


SKIPPED = {".gitattributes", "pytorch_model.bin", "optimizer.pt", "onnx/model.onnx"}


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    """What `qtool download` takes of `model_files`."""
    return {path: data for path, data in files.items() if path not in SKIPPED}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    found.pop("qtool.lock.json", None)
    return found


@pytest.fixture
def model_repo(hub: Hub) -> dict[str, bytes]:
    """The files of org/model on the hub under test."""
    files = model_files()
    hub.server.repos["org/model"] = Repo(files)
    return files
