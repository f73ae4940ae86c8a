"""KL divergence of models from a base as transformers runs them, window by window. Knows nothing of qtool.

usage: _judge.py BASE TEXT WINDOWS LENGTH MODEL...

Prints one line of JSON for each model. The base's log-probabilities wait in a temporary file: 100 MB for a window of
SmolLM2.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
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
    """In float32. What was decompressed is rounded already, so it is not rounded again in every step."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        model(torch.tensor([[0]]))  # decompresses
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            scheme.weights = None
    return model


class Judge:
    """Holds what a base says of some windows."""

    def __init__(self, base: Any, windows: Any, folder: str) -> None:
        """`windows` is int64 [count, length]; `folder` takes the base's log-probabilities."""
        import numpy as np
        import torch

        self._windows = windows
        shape = (len(windows), windows.shape[1] - 1, base.config.vocab_size)
        self._wanted = np.memmap(Path(folder) / "base", np.float32, "w+", shape=shape)
        with torch.no_grad():
            for at, row in enumerate(windows):
                self._wanted[at] = base(row[None]).logits[0, :-1].float().log_softmax(-1).numpy()

    def __call__(self, model: Any) -> dict[str, float]:
        """`kl` in nats per token with its standard error over the windows, and `top1`, the share of tokens where both
        find the same one likeliest."""
        import torch

        kl, same = [], []
        with torch.no_grad():
            for row, base in zip(self._windows, self._wanted, strict=True):
                logits, each = model(row[None]).logits[0, :-1].float(), []
                for at in range(0, len(logits), 8):  # what fits in a processor's cache
                    wanted, found = torch.from_numpy(base[at : at + 8]), logits[at : at + 8].log_softmax(-1)
                    each.append((wanted.exp() * (wanted - found)).sum(-1))
                    same.append((wanted.argmax(-1) == found.argmax(-1)).float())
                kl.append(torch.cat(each).mean())
        found = torch.stack(kl)
        error = (found.std() / len(found) ** 0.5).item()
        return {"kl": found.mean().item(), "error": error, "top1": torch.cat(same).mean().item()}


def judge(base: Any, model: Any, windows: Any) -> dict[str, float]:
    """One model alone."""
    with tempfile.TemporaryDirectory() as folder:
        return Judge(base, windows, folder)(model)


def main(base: str, text: str, count: str, length: str, *models: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ask = Judge(load(base), token_windows(base, text, int(count), int(length)), folder)
        for model in models:
            print(json.dumps(ask(load(model))), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
