# mypy: disable-error-code="import-not-found"
"""SmoothQuant and W8A8 with llm-compressor. Runs in its own environment: knows nothing of qtool.

usage: _llm_compressor.py MODEL TEXT SAMPLES SEQ_LEN OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(model_folder: str, text: str, samples: int, seq_len: int, output: str) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][: samples * seq_len]
    if len(ids) < samples * seq_len:
        sys.exit(f"{text} has {len(ids)} tokens, {samples * seq_len} are needed")
    rows = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    # Experts become linears of their own. (Its load_quantizable_moe, which loads them so, needs torchvision.)
    linearize_moe(model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * seq_len for _ in rows]}),
        recipe=[
            SmoothQuantModifier(smoothing_strength=0.5),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head", "re:.*mlp.gate$"]),
        ],
        max_seq_length=seq_len,
        num_calibration_samples=samples,
    )
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
