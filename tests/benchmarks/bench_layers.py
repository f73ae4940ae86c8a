"""Cost of `qtool quantize` on one or two decoder layers of real size, with random weights.

    bench_layers.py [TYPE ...]    of qwen3_next, gpt_oss and gemma4_text; up to 12 GB of disk, one after the other

Sizes are the defaults of transformers' configurations, but for the number of layers and a vocabulary of 32,768. gpt-oss
has the 32 experts of its smaller model, in MXFP4, as it is published; the others are bfloat16, with all experts of a
layer in one tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks._common import table
from tests.benchmarks.bench_giant import COLUMNS, cost

VOCABULARY = 32768
LAYERS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention"], "num_local_experts": 32},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"]},
}
_STEP = 1 << 24  # numbers at a time


def make(model_type: str, folder: Path) -> Path:
    """Write a model, one file per tensor of a hundred megabytes or more."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tests.families import train_tokenizer

    sizes = LAYERS[model_type]
    config = CONFIG_MAPPING[model_type](
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        num_hidden_layers=len(sizes["layer_types"]),
        **sizes,
    )
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    train_tokenizer(4096).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | {"architectures": [type(model).__name__]}
    if model_type == "gpt_oss":
        content["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(content))
    generator, places, small = torch.Generator().manual_seed(0), dict[str, str](), dict[str, torch.Tensor]()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, parameter in model.state_dict().items():
        if name in tied:
            continue
        for stored, tensor in _tensors(model_type, name, tuple(parameter.shape), generator):
            if tensor.nbytes < 100_000_000:
                small[stored] = tensor
                continue
            file = f"model-{len(places):05d}.safetensors"
            save_file({stored: tensor}, folder / file, {"format": "pt"})
            places[stored] = file
    save_file(small, folder / "model-rest.safetensors", {"format": "pt"})
    places |= dict.fromkeys(small, "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _tensors(model_type: str, name: str, shape: tuple[int, ...], generator: Any) -> Iterator[tuple[str, Any]]:
    import torch

    if model_type == "gpt_oss" and len(shape) == 3:  # [experts, in, out]
        experts, width, out = shape
        sizes = (experts, out, width // 32, 16)
        yield f"{name}_blocks", torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
        yield f"{name}_scales", torch.randint(117, 121, sizes[:3], generator=generator, dtype=torch.uint8)
        return
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    flat = tensor.view(-1)
    if len(shape) < 2:
        flat.copy_(1 + 0.1 * torch.randn(flat.shape, generator=generator))
    for start in range(0, flat.numel() if len(shape) > 1 else 0, _STEP):
        part = flat[start : start + _STEP]
        part.copy_(torch.randn(part.shape, generator=generator) / math.sqrt(shape[-1]))
    yield name, tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=[*LAYERS])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the models go; a temporary one")
    options = parser.parse_args()
    arguments = ["--scheme", "w8a8-dynamic", "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    rows = []
    for model_type in options.types:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            child = os.fork()
            if child == 0:  # what making takes must not count
                make(model_type, folder / "source")
                os._exit(0)
            os.waitpid(child, 0)
            found = cost(folder / "source", folder / "result", arguments)
        finally:
            shutil.rmtree(folder)
        rows.append([f"{model_type}: {', '.join(LAYERS[model_type]['layer_types'])}", *found.row()])
        print(table(["layers", *COLUMNS], rows[-1:]), flush=True)
    print(f"\n{options.samples} x {options.seq_len} tokens, qtool quantize {' '.join(arguments)}\n")
    print(table(["layers", *COLUMNS], rows))


if __name__ == "__main__":
    main()
