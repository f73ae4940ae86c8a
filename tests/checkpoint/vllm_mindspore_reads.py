"""What the native models of vLLM-MindSpore 0.5.1 take of golden-stick checkpoints.

python vllm_mindspore_reads.py FOLDER..., as vllm_mindspore_on_cpu.py; lines of JSON as of vllm_reads. Only quantized
linear layers count: the rest of these models needs a vLLM of their own. So `parameters` are theirs, all of them filled,
by name, dtype and shape, or `error` says which isn't.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import vllm_mindspore_on_cpu as plugin  # type: ignore[import-not-found]

FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
SPARE = ("weight_scale", "weight_offset")  # deq_scale says the same


def read(folder: Path) -> dict[str, Any]:
    stored, config = plugin.read(folder)
    layers = {found[0] for name in stored if (found := re.match(r"model\.layers\.\d+", name))}
    count, taken, unread = 0, 0, set()
    for prefix in (f"{layer}.{linear}" for layer in sorted(layers) for linear in FUSED):
        if (found := plugin.linear(prefix, stored, config)) is None:
            continue
        names = {part for part, _ in found[1].parameters_and_names()}
        count += len(names)
        shards = plugin.parts(prefix)
        taken += len(names) * len(shards)
        own = {name for name in stored for shard in shards if name.startswith(f"{shard}.")}
        unread |= {name for name in own if name.rpartition(".")[2] not in {*names, *SPARE, "bias"}}
    return {"parameters": count, "tensors": taken, "untouched": [], "unread": sorted(unread), "mistyped": []}


for folder in sys.argv[1:]:
    try:
        found = read(Path(folder))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"model": folder, **found}), flush=True)
