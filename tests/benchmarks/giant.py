"""Checkpoints with the layers of DeepSeek-R1 in their real size, written as fast as the disk takes them.

usage: giant.py OUT [--size r1|small] [--dense 1] [--moe 1] [--vocabulary 4096]

Tensors, types and config.json are those on the hub: FP8 (e4m3) projections with a float32 scale per 128 x 128 block,
the rest bfloat16. Only depth and vocabulary are cut, and the layer that predicts one token further is left out. The
weights are random: Gaussian codes, scales that differ from block to block, a few loud channels in the residual stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# deepseek-ai/DeepSeek-R1's config.json, without its remote code.
R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
SMALL: dict[str, Any] = R1 | {
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "kv_lora_rank": 256,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
}
SIZES = {"r1": R1, "small": SMALL}

_SHARD_BYTES = 4_300_000_000  # as on the hub
_POOL, _PIECE = 1 << 26, 1 << 22
_LOUD, _LOUDNESS = 8, 40.0
_WIDTH = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * _WIDTH[self.dtype]


def make(
    folder: Path,
    size: str = "r1",
    *,
    dense: int = 1,
    moe: int = 1,
    vocabulary: int = 4096,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write the checkpoint of `dense` + `moe` layers, with a tokenizer of its vocabulary; `changes` to config.json."""
    from tests.families import train_tokenizer

    config = SIZES[size] | {
        "first_k_dense_replace": dense,
        "num_hidden_layers": dense + moe,
        "num_nextn_predict_layers": 0,
        "vocab_size": vocabulary,
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    train_tokenizer(vocabulary).save_pretrained(folder)
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors(config):
        if sum(t.nbytes for t in shards[-1]) + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    filler = _Filler(config, np.random.default_rng(seed))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        _write(folder / file, shard, filler)
        index |= {tensor.name: file for tensor in shard}
    about = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about, indent=2))
    return folder


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Name, type and shape of every tensor, in the order of the layers."""
    c = config
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    rope, nope = c["qk_rope_head_dim"], c["qk_nope_head_dim"]

    def linear(name: str, out: int, width: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", "F8_E4M3", (out, width))
        yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-out // 128), -(-width // 128)))

    def mlp(name: str, width: int) -> Iterator[Tensor]:
        yield from linear(f"{name}.gate_proj", width, hidden)
        yield from linear(f"{name}.up_proj", width, hidden)
        yield from linear(f"{name}.down_proj", hidden, width)

    yield Tensor("model.embed_tokens.weight", "BF16", (c["vocab_size"], hidden))
    for number in range(c["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        yield Tensor(f"{layer}.input_layernorm.weight", "BF16", (hidden,))
        yield from linear(f"{attention}.q_a_proj", c["q_lora_rank"], hidden)
        yield Tensor(f"{attention}.q_a_layernorm.weight", "BF16", (c["q_lora_rank"],))
        yield from linear(f"{attention}.q_b_proj", heads * (nope + rope), c["q_lora_rank"])
        yield from linear(f"{attention}.kv_a_proj_with_mqa", c["kv_lora_rank"] + rope, hidden)
        yield Tensor(f"{attention}.kv_a_layernorm.weight", "BF16", (c["kv_lora_rank"],))
        yield from linear(f"{attention}.kv_b_proj", heads * (nope + c["v_head_dim"]), c["kv_lora_rank"])
        yield from linear(f"{attention}.o_proj", hidden, heads * c["v_head_dim"])
        yield Tensor(f"{layer}.post_attention_layernorm.weight", "BF16", (hidden,))
        if number < c["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", c["intermediate_size"])
            continue
        yield Tensor(f"{layer}.mlp.gate.weight", "BF16", (c["n_routed_experts"], hidden))
        yield Tensor(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],))
        for expert in range(c["n_routed_experts"]):
            yield from mlp(f"{layer}.mlp.experts.{expert}", c["moe_intermediate_size"])
        yield from mlp(f"{layer}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
    yield Tensor("model.norm.weight", "BF16", (hidden,))
    yield Tensor("lm_head.weight", "BF16", (c["vocab_size"], hidden))


def _write(file: Path, shard: list[Tensor], filler: _Filler) -> None:
    header, start = {}, 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            for piece in filler.pieces(tensor):
                rest = piece.reshape(-1).view(np.uint8).data
                while rest:
                    rest = rest[out.write(rest) :]


class _Filler:
    """The bytes of a tensor. FP8 codes are pieces of one pool, taken at random places: they cost but the writing."""

    def __init__(self, config: dict[str, Any], rng: np.random.Generator) -> None:
        import torch

        self._rng = rng
        # A block's largest of 16384 Gaussian values, 4.4 deviations, is the largest code, 448.
        values = rng.standard_normal(_POOL, dtype=np.float32) * np.float32(448 / 4.4)
        codes = torch.from_numpy(values.clip(-448, 448)).to(torch.float8_e4m3fn)
        self._pool = codes.view(torch.uint8).numpy()
        self._loud = rng.choice(config["hidden_size"], _LOUD, replace=False)
        self._widths = {f"{t.name}_scale_inv": t.shape[1] for t in tensors(config) if t.dtype == "F8_E4M3"}

    def pieces(self, tensor: Tensor) -> Iterator[np.ndarray]:
        if tensor.dtype == "F8_E4M3":
            left = tensor.nbytes
            while left:
                size = min(left, _PIECE)
                start = int(self._rng.integers(_POOL - size))
                yield self._pool[start : start + size]
                left -= size
        else:
            values = self._values(tensor).astype(np.float32)
            if tensor.dtype == "BF16":
                yield (values.view(np.uint32) >> 16).astype(np.uint16)
            else:
                yield values

    def _values(self, tensor: Tensor) -> np.ndarray:
        rng, name, shape = self._rng, tensor.name, tensor.shape
        if name in self._widths:  # codes have deviation 448 / 4.4; a weight 1 / sqrt(in), more or less
            return rng.lognormal(0, 0.3, shape) * (4.4 / 448) / self._widths[name] ** 0.5
        if name.endswith("norm.weight"):
            return rng.uniform(0.6, 1.4, shape)
        if name.endswith("e_score_correction_bias"):
            return rng.normal(0, 0.02, shape)
        if name.endswith("embed_tokens.weight"):
            values = rng.standard_normal(shape, dtype=np.float32)
            values[:, self._loud] *= _LOUDNESS
            return values
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(2 / shape[1] ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="r1")
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--moe", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    folder = make(options.out, options.size, dense=options.dense, moe=options.moe, vocabulary=options.vocabulary)
    print(folder, f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e9:.2f} GB", sep="\t")


if __name__ == "__main__":
    main()
