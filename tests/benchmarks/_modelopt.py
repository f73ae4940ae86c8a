# mypy: disable-error-code="import-not-found"
"""Quantize with ModelOpt and judge what it simulates, in memory. Runs in its own environment: knows nothing of qtool.

usage: _modelopt.py MODEL TEXT SAMPLES SEQ_LEN HELD_OUT WINDOWS SCHEME

SCHEME is w8a8 (INT8_SMOOTHQUANT, static activations), w8a16, w4a16 (AWQ in groups of 64), fp8 (per token), or mix:BITS:
auto_quantize's choice of 4-bit weights (nearest, in groups of 64) and 8-bit ones with so many bits on average. Prints
one line of JSON, with processor seconds without judging. BITS count lm_head, which stays at 16.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _judge import judge, load, token_windows


def main(folder: str, text: str, samples: int, seq_len: int, held_out: str, windows: int, scheme: str) -> None:
    import modelopt.torch.quantization as mtq

    started = time.process_time()
    model, rows = load(folder), token_windows(folder, text, samples, seq_len)
    int4 = _in_groups(copy.deepcopy(mtq.INT4_AWQ_CFG), 64)
    configs = {
        "w8a8": mtq.INT8_SMOOTHQUANT_CFG,
        "w8a16": mtq.INT8_WEIGHT_ONLY_CFG,
        "w4a16": int4,
        "fp8": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    }

    def forward(model: Any) -> None:
        for row in rows:
            model(row[None])

    if scheme.startswith("mix:"):
        model, _ = mtq.auto_quantize(
            model,
            constraints={"effective_bits": float(scheme[4:])},
            quantization_formats=[
                _in_groups(copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG), 64),
                mtq.INT8_WEIGHT_ONLY_CFG,
            ],
            data_loader=[{"input_ids": row[None], "labels": row[None]} for row in rows],
            forward_step=lambda model, batch: model(**batch),
            loss_func=lambda output, batch: output.loss,
            disabled_layers=["*lm_head*"],
            num_calib_steps=samples,
            num_score_steps=samples,
        )
    else:
        model = mtq.quantize(model, configs[scheme], forward)
    seconds = time.process_time() - started
    found = judge(load(folder), model, token_windows(folder, held_out, windows, seq_len))
    print(json.dumps(found | {"seconds": seconds, "bits": _bits(model)}))


def _in_groups(config: Any, size: int) -> Any:
    """The same with other groups wherever it has some."""
    if isinstance(config, dict):
        if "block_sizes" in config:
            config["block_sizes"] = {-1: size}
        for value in config.values():
            _in_groups(value, size)
    elif isinstance(config, list):
        for value in config:
            _in_groups(value, size)
    return config


def _bits(model: Any) -> float:
    """Of the linears' weights on average, without scales."""
    total = count = 0
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and "lm_head" not in name and "embed" not in name:
            bits = 16 if not quantizer.is_enabled else quantizer.num_bits
            total += module.weight.numel() * (8 if isinstance(bits, tuple) else bits)
            count += module.weight.numel()
    return total / max(count, 1)


if __name__ == "__main__":
    if len(sys.argv) != 8:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6]), sys.argv[7])
