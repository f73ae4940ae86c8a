# mypy: disable-error-code="import-not-found"
"""Quantize with auto-round, and write the floats that its integers stand for. Runs in its own environment.

usage: _auto_round.py MODEL TEXT SAMPLES SEQ_LEN OUTPUT SCHEME ITERATIONS

SCHEME is w8a8 (which is written as compressed-tensors, since its activations are quantized too), w8a16 or w4a16 (in
groups of 64), or mix:BITS: AutoScheme's choice of these two with so many bits on average. ITERATIONS is 0 for nearest.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(folder: str, text: str, samples: int, seq_len: int, output: str, scheme: str, iterations: int) -> None:
    import torch
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][: samples * seq_len]
    rows = [torch.tensor(ids[start : start + seq_len]) for start in range(0, len(ids), seq_len)]
    data: Any = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def weights_only(bits: int, group: int) -> Any:
        return QuantizationScheme.from_dict(
            {"bits": bits, "group_size": group, "sym": True, "data_type": "int", "act_bits": 16}
        )

    known = {"w8a8": "INT8_W8A8", "w8a16": weights_only(8, -1), "w4a16": weights_only(4, 64)}
    if scheme.startswith("mix:"):
        options, file = [known["w4a16"], known["w8a16"]], Path(output).with_suffix(".jsonl")
        texts = [tokenizer.decode(ids[start : start + seq_len + 8]) for start in range(0, len(ids) - seq_len, seq_len)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        wanted: Any = AutoScheme(
            avg_bits=float(scheme[4:]), options=options, nsamples=samples, seqlen=seq_len, dataset=str(file)
        )
        data = str(file)
    else:
        wanted = known[scheme]
    run = AutoRound(
        model,
        tokenizer,
        scheme=wanted,
        dataset=data,
        iters=iterations,
        seqlen=seq_len,
        nsamples=samples,
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
    )
    run.quantize_and_save(output, format="llm_compressor" if scheme == "w8a8" else "fake")
    (made,) = Path(output).iterdir()  # it makes a folder with a name of its own
    for file in made.iterdir():
        file.rename(Path(output) / file.name)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 8:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6], int(sys.argv[7]))
