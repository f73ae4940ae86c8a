"""How a runtime is set up for the hardware: configs/runtime-*.yaml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import config as claims
from qtool.environments import machine
from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

DTYPES = ("bfloat16", "float16", "float32")
_ALIASES = {"half": "float16", "float": "float32"}  # vLLM's


def settings(hardware: str) -> dict[str, Any]:
    """What configs/runtime-*.yaml says for cpu, cuda or ascend; that file explains its keys."""
    import yaml

    from qtool import resources

    file = resources.folder("configs") / f"runtime-{hardware}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def environment(hardware: str, *, batch: bool = True) -> dict[str, str]:
    """The settings' variables, for a batch of prompts or for a server; those that the user has set win."""
    known = settings(hardware)
    env = known["env"] | (known.get("batch", {}).get("env", {}) if batch else {})
    if hardware == "cpu":
        env = {"OMP_NUM_THREADS": str(machine.cpus()), **env}
    return {name: value for name, value in env.items() if name not in os.environ}


def engine(hardware: str, *, batch: bool = True) -> dict[str, Any]:
    """The settings' EngineArgs, for a batch of prompts or for a server."""
    known = settings(hardware)
    return dict(known["engine"] | (known.get("batch", {}).get("engine", {}) if batch else {}))


def dtype(checkpoint: Checkpoint, hardware: str, given: Mapping[str, Any] | None = None) -> str:
    """The name of the dtype in which runtimes compute: that of config.json, where it is one they have.

    What `--set` says (`given`) comes before that: a dtype, or that of keys and values. vLLM 0.32 on CPUs takes one for
    the other where they differ, and answers with noise.

    x86 processors without AVX-512 multiply 16-bit floats in batches several times as slowly as 32-bit ones: there it is
    float32, if the model's floats take no more than half of the memory then.

    Raises:
        InputError: `given` has two that differ, on a CPU.
    """
    asked = given or {}
    named, cache = (_ALIASES.get(str(name), name) for name in (asked.get("dtype"), asked.get("kv_cache_dtype")))
    if hardware == "cpu" and cache in DTYPES:
        if named in DTYPES and named != cache:
            what = f"keys and values in {cache} beside {named} are noise in vLLM's build for CPUs"
            raise InputError(what, where="--set kv_cache_dtype", hint=f"Leave it out, or add --set dtype={cache}.")
        return str(cache)
    if named:
        return str(named)
    config, text_config = checkpoint.config, claims.text_config(checkpoint.config)
    named = str(config.get("dtype") or config.get("torch_dtype") or text_config.get("dtype"))
    named = named if named in DTYPES else DTYPES[0]
    flags, memory = machine.cpu_flags(), machine.memory()
    if hardware != "cpu" or "avx2" not in flags or "avx512f" in flags or memory is None:
        return named
    halves = sum(i.nbytes for i in map(checkpoint.info, checkpoint.names) if i.dtype in ("F16", "BF16"))
    return "float32" if 2 * halves <= memory["total_bytes"] / 2 else named


def preload(hardware: str, python: str) -> dict[str, str]:
    """LD_PRELOAD with the libraries of the settings that are there: beside the interpreter, or the system's."""
    prefix = Path(python).parent.parent
    folders = [prefix / "lib", *map(Path, settings(hardware).get("libraries", ()))]
    named = os.environ.get("LD_PRELOAD", "").split(":")
    found = []
    for name in settings(hardware).get("preload", ()):
        if any(name in path for path in named):
            continue  # the user's own
        matches = [match for folder in folders for match in sorted(folder.glob(f"{name}.so*"))]
        found += [str(match) for match in matches[:1]]
    return {"LD_PRELOAD": ":".join(filter(None, [*found, *named]))} if found else {}
