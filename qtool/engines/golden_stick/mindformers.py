"""MindFormers' side of Golden Stick: its YAML, and the msrun line that starts one process per card.

`settings` and `command` only describe a run; `qtool.engines.golden_stick.launch` does it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qtool import resources
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError

MODEL_TYPES = ("deepseek_v3", "qwen3", "qwen3_moe", "telechat")
"""The values of config.json's model_type that mindspore-gs 1.4.1 quantizes through MindFormers."""


def settings(checkpoint: Checkpoint, *, devices: int, folder: Path, seed: int, seq_len: int) -> dict[str, Any]:
    """MindFormers' YAML for calibrating a model, as a mapping.

    Args:
        checkpoint: the float model; its tokenizer and config.json are MindFormers' too.
        devices: cards, over which every matrix is split.
        folder: for what MindFormers itself writes.
        seq_len: tokens in a calibration sample.

    Raises:
        InputError: the cards can't share the attention heads evenly, or the samples are too long.
    """
    heads = checkpoint.config.get("num_attention_heads") or checkpoint.config.get("n_head") or devices
    if heads % devices:
        raise InputError(f"{heads} attention heads can't be divided among {devices} cards", where="--devices")
    shipped = _shipped()
    result = _merged(shipped["common"], shipped[checkpoint.config["model_type"]])
    model = result["model"]["model_config"]
    room = model["block_size"] * model["num_blocks"]
    if seq_len >= room:
        raise InputError(f"samples of {seq_len} tokens don't fit the cache of {room}", where="--seq-len")
    result |= {
        "seed": seed,
        "output_dir": str(folder),
        "pretrained_model_dir": str(checkpoint.path.resolve()),
        "use_parallel": devices > 1,
    }
    result["parallel_config"] |= {"model_parallel": devices}
    return result


def command(devices: int, folder: Path, *program: str) -> list[str]:
    """The msrun line for `program`, a Python file and its arguments, on that many cards of this host."""
    msrun = _shipped()["msrun"]
    return [
        "msrun",
        f"--worker_num={devices}",
        f"--local_worker_num={devices}",
        f"--master_port={msrun['master_port']}",
        f"--cluster_time_out={msrun['cluster_time_out']}",
        "--join=True",
        f"--log_dir={folder}",
        *program,
    ]


def environment() -> dict[str, str]:
    """Variables for every card's process; those that the user has set win."""
    return {name: value for name, value in _shipped()["env"].items() if name not in os.environ}


def as_yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)


def _shipped() -> dict[str, Any]:
    file = resources.folder("configs") / "golden-stick.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = base.keys() & over.keys()
    nested = {key: _merged(base[key], over[key]) for key in both if isinstance(base[key], dict)}
    return {**base, **over, **nested}
