"""KL divergence between two models as transformers runs them, window by window. Knows nothing of qtool.

usage: _judge.py BASE TEXT WINDOWS LENGTH MODEL
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def token_windows(model: str, text: str, count: int, length: int) -> Any:
    """The first windows of a file of text: int64 [count, length]."""
    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < count * length:
        sys.exit(f"{text} has {len(ids)} tokens, {count * length} are needed")
    return torch.tensor(ids[: count * length]).view(count, length)


def load(folder: str) -> Any:
    """In float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def judge(base: Any, model: Any, windows: Any) -> dict[str, float]:
    """`kl` in nats per token, and `top1`, the share of tokens where both find the same one likeliest."""
    import torch

    kl = same = count = 0.0
    with torch.no_grad():
        for row in windows:
            wanted, found = (each(row[None]).logits[0, :-1].float().log_softmax(-1) for each in (base, model))
            kl += (wanted.exp() * (wanted - found)).sum().item()
            same += (wanted.argmax(-1) == found.argmax(-1)).sum().item()
            count += len(wanted)
    return {"kl": kl / count, "top1": same / count}


def main(base: str, text: str, count: str, length: str, model: str) -> None:
    windows = token_windows(base, text, int(count), int(length))
    print(json.dumps(judge(load(base), load(model), windows)))


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
