"""How a runtime is set up for the hardware: configs/runtime-*.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.environments import machine

if TYPE_CHECKING:
    from qtool.checkpoint.reader import Checkpoint

DTYPES = ("bfloat16", "float16", "float32")


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


def dtype(checkpoint: Checkpoint, hardware: str) -> str:
    """The name of the dtype in which runtimes compute: that of config.json, where it is one they have.

    x86 processors without AVX-512 multiply 16-bit floats in batches several times as slowly as 32-bit ones: there it is
    float32, if the model's floats take no more than half of the memory then.
    """
    config = checkpoint.config
    text_config = config.get("text_config") or config
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
