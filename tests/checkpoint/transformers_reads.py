"""What transformers takes of checkpoints: python transformers_reads.py FOLDER..., lines of JSON as of vllm_reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import logging

from qtool.checkpoint.auto import auto_class

logging.set_verbosity_error()


def read(folder: str) -> dict[str, Any]:
    model, info = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    names = {name for file in Path(folder).glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    return {
        "parameters": len(model.state_dict()),
        "untouched": sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])),
        "tensors": len(names.difference(info["unexpected_keys"])),
        "unread": sorted(info["unexpected_keys"]),
    }


for folder in sys.argv[1:]:
    try:
        found = read(folder)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"model": folder, **found}), flush=True)
