"""What `check.py` quantizes: tiny models to compare numbers with, and single decoder layers of real shapes to time."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests import families
from tests.benchmarks import giant

TINY = ("llama", "qwen3_moe", "deepseek_v3")
# Of 256, each of the real size: all of them take 11 GB of disk. With one expert per token instead of 8 each sees as
# many tokens as in the whole layer, which then costs eight times as much but for attention.
R1_EXPERTS = 32
_FIRST = "model.layers.0."
_WORDS = 10240  # more than any layer is wide, so that its inputs span all directions


@dataclass(frozen=True)
class Shape:
    """A decoder layer.

    Attributes:
        model_type: of `families.FAMILIES`, or deepseek_v3 for the layer of DeepSeek-R1.
        changes: to its config.json.
        small: the same for machines without a device.
        options: for `qtool quantize`.
    """

    model_type: str
    changes: dict[str, Any]
    small: dict[str, Any]
    options: tuple[str, ...] = ()


def _dense(model_type: str, hidden: int, intermediate: int, heads: int) -> Shape:
    changes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    changes |= {"num_key_value_heads": 8, "head_dim": 128}
    small = {"hidden_size": hidden // 16, "intermediate_size": intermediate // 16, "head_dim": 16}
    return Shape(model_type, changes, changes | small)


SHAPES = {
    "llama-3-8b": _dense("llama", 4096, 14336, 32),
    "qwen3-32b": _dense("qwen3", 5120, 25600, 64),
    "llama-3-70b": _dense("llama", 8192, 28672, 64),
    f"deepseek-r1-{R1_EXPERTS}-experts": Shape(
        "deepseek_v3",
        {"n_routed_experts": R1_EXPERTS, "num_experts_per_tok": 1},
        {"n_routed_experts": 16, "num_experts_per_tok": 1},
        ("--recipe", "deepseek-r1-osl"),
    ),
}


def tiny(folder: Path, model_type: str, tokenizer: Any) -> Path:
    """A model of two layers; its activations have outliers as real ones have."""
    more: dict[str, Any] = {"num_nextn_predict_layers": 0} if model_type == "deepseek_v3" else {}
    return families.make(folder, model_type, tokenizer, **more)


def layers(folder: Path, name: str, *, count: int, small: bool) -> Path:
    """A model of so many equal layers of SHAPES with random weights. Its tokenizer knows the words of `text`."""
    _layer(folder, name, small=small)
    if count > 1:
        _repeat(folder, count)
    return folder


def _layer(folder: Path, name: str, *, small: bool) -> Path:
    shape = SHAPES[name]
    changes = shape.small if small else shape.changes
    if shape.model_type == "deepseek_v3":
        giant.make(folder, "small" if small else "r1", dense=0, moe=1, vocabulary=_WORDS, **changes)
        _tokenizer().save_pretrained(folder)
        return folder
    more: dict[str, Any] = {"num_hidden_layers": 1, "max_position_embeddings": 8192}
    return families.make(folder, shape.model_type, _tokenizer(), **changes, **more)


def _repeat(folder: Path, count: int) -> None:
    """Give a model of one layer so many that are equal."""
    files = sorted(folder.glob("*.safetensors"))
    index: dict[str, str] = {}
    for file in files:
        tensors = load_file(file)
        index |= dict.fromkeys(tensors, file.name)
        for number in range(1, count):
            copies = {
                name.replace(_FIRST, f"model.layers.{number}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(_FIRST)
            }
            if copies:
                copy = f"layer-{number}-{file.name}"
                save_file(copies, folder / copy, metadata={"format": "pt"})
                index |= dict.fromkeys(copies, copy)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    if len(files) == 1:  # beside an index this name would be read alone
        files[0].rename(folder / "layer-0.safetensors")
        renamed = {name: "layer-0.safetensors" if file == files[0].name else file for name, file in index.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": renamed}))


def text(file: Path, tokens: int) -> Path:
    """Random words, one token each."""
    words = random.Random(0).choices(range(_WORDS), k=tokens + 2048)
    file.write_text(" ".join(f"w{word}" for word in words))
    return file


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.WordLevel({f"w{word}": word for word in range(_WORDS)}, unk_token="w0"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, bos_token="w0", eos_token="w1", pad_token="w1")
