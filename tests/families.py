"""Tiny checkpoints of the mixture-of-experts families, named and typed as on the hub, with what makes real ones hard.

In the residual stream a few channels are 20 to 60 times larger than the rest, one of them always of the same sign.
Routers starve two experts, by that channel or by their correction bias: STARVED gets no token at all, RARE few. Rows
of projections differ in size by a heavy-tailed factor. Nothing here uses qtool.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP8_BLOCK = 128
STARVED, RARE = 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_DEEPSEEK_LIKE: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 160,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 1.5,
}
# model_type -> config.json, in the hub's words. No width is a multiple of 128; all are of 32, as vLLM's kernels want.
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "kv_lora_rank": 96,
        "n_group": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 160,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "v_head_dim": 32,
        **_DEEPSEEK_LIKE,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 160,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "head_dim": 32,
        "intermediate_size": 160,
        "num_experts_per_tok": 2,
        "num_local_experts": 6,
        "sliding_window": None,
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "head_dim": 32,
        "n_group": 1,
        "partial_rotary_factor": 0.5,
        "topk_group": 1,
        "use_qk_norm": True,
        **_DEEPSEEK_LIKE,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "llama": {"architectures": ["LlamaForCausalLM"], "head_dim": 32},
}


def train_tokenizer(entries: int) -> Any:
    """A byte-level BPE tokenizer trained on CPython's own help texts, with a chat template.

    Entries 0 to 3 are <s>, </s>, <|im_start|> and <|im_end|>; it adds no special tokens by itself.
    """
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        show_progress=False,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator([topics[name] for name in sorted(topics)[: 20 if entries < 1000 else None]], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make(
    folder: Path,
    model_type: str,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A random model of one of FAMILIES, with its tokenizer.

    Args:
        folder: made.
        dtype: of every tensor but `e_score_correction_bias`, which is float32 as in DeepSeek-V3.
        shards: more than one are cut by size alone: experts straddle them.
        changes: to config.json. `num_nextn_predict_layers: 0` leaves out the layer that predicts one token further.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {
        "model_type": model_type,
        **_COMMON,
        **FAMILIES[model_type],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": len(tokenizer),
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = _Filler(config).fill(_as_published(shapes, config))
    typed = {
        name: tensor.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        for name, tensor in tensors.items()
    }
    save(typed, folder, shards)
    tokenizer.save_pretrained(folder)
    return folder


def save(tensors: Mapping[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """Write tensors as the hub does: model.safetensors, or as many shards of about one size with their index."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total, before = sum(tensor.nbytes for tensor in tensors.values()), 0
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        parts[before * shards // total][name] = tensor
        before += tensor.nbytes
    index: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def routed(config: Mapping[str, Any]) -> int:
    """How many experts a config.json has; 0 for a dense model."""
    return next((config[k] for k in ("n_routed_experts", "num_experts", "num_local_experts") if k in config), 0)


def to_fp8(source: Path, target: Path, shards: int = 1) -> Path:
    """A float checkpoint as DeepSeek publishes its own: FP8 (e4m3) with a float32 scale per block of 128 x 128.

    Projections become FP8, those of the layer that predicts one token further as well. Embeddings, norms, biases,
    routers, lm_head and eh_proj stay as they are. Blocks at the edge are cut off, not padded.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load(source).items():
        if not is_fp8(name):
            tensors[name] = tensor
            continue
        weight = tensor.float().numpy()
        scale = _per_block(np.abs(weight)).clip(min=1e-12) / np.float32(448)
        wide = np.repeat(np.repeat(scale, FP8_BLOCK, 0), FP8_BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        codes = torch.from_numpy(np.clip(weight / wide, -448, 448)).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, torch.from_numpy(scale)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    save(tensors, target, shards)
    return target


def is_fp8(name: str) -> bool:
    return bool(re.search(r"(_proj|_proj_with_mqa|\.w[123])\.weight$", name)) and "eh_proj" not in name


def from_fp8(source: Path, target: Path) -> Path:
    """The same model in float32, each weight the product of its code and its block's scale."""
    stored = load(source)
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        tensors[name] = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale_inv"].numpy()
            tensors[name] = torch.from_numpy(dequantize(tensor.view(torch.uint8).numpy(), scale))
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2))
    save(tensors, target)
    return target


def dequantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [out, in] from e4m3 codes, uint8 [out, in], and scales [⌈out/128⌉, ⌈in/128⌉], one block at a time."""
    weight = E4M3[codes]
    for i, j in np.ndindex(scale.shape):
        weight[i * FP8_BLOCK : (i + 1) * FP8_BLOCK, j * FP8_BLOCK : (j + 1) * FP8_BLOCK] *= scale[i, j]
    return weight


def _e4m3() -> np.ndarray:
    """The value of each of the 256 codes (OCP 8-bit floating point specification, 5.1): no infinities, two NaN."""
    code = np.arange(256)
    sign, exponent, mantissa = 1 - 2.0 * (code >> 7), (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(code & 127 == 127, np.nan, sign * size).astype(np.float32)


E4M3 = _e4m3()


def _per_block(magnitude: np.ndarray) -> np.ndarray:
    """The maximum of each block; the last ones may be smaller."""
    rows = np.maximum.reduceat(magnitude, np.arange(0, magnitude.shape[0], FP8_BLOCK), axis=0)
    return np.maximum.reduceat(rows, np.arange(0, magnitude.shape[1], FP8_BLOCK), axis=1)


def _as_published(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """transformers 5 fuses experts; published checkpoints have three matrices for each, and the extra layer."""
    mixtral = config["model_type"] == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        block, fused, part = name.partition(".experts.")
        if mixtral:
            block = block.replace(".mlp", ".block_sparse_moe")
        if not fused:
            found[block] = shape
        elif part == "gate_up_proj":
            count, twice, width = shape
            for expert in range(count):
                found[f"{block}.experts.{expert}.{gate}.weight"] = (twice // 2, width)
                found[f"{block}.experts.{expert}.{up}.weight"] = (twice // 2, width)
                found[f"{block}.experts.{expert}.{down}.weight"] = (width, twice // 2)
    if config.get("num_nextn_predict_layers"):
        # The names and parts of DeepSeek-V3's layer 61 and GLM-4.5's 46, after the layer of the usual kind.
        depth, hidden, words = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
        last, extra = f"model.layers.{depth - 1}.", f"model.layers.{depth}."
        found |= {extra + name.removeprefix(last): shape for name, shape in found.items() if name.startswith(last)}
        found |= {
            f"{extra}eh_proj.weight": (hidden, 2 * hidden),
            f"{extra}embed_tokens.weight": (words, hidden),
            f"{extra}enorm.weight": (hidden,),
            f"{extra}hnorm.weight": (hidden,),
            f"{extra}shared_head.head.weight": (words, hidden),
            f"{extra}shared_head.norm.weight": (hidden,),
        }
    return found


class _Filler:
    """Random values for a model's tensors, by name and shape."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        hidden = config["hidden_size"]
        chosen = torch.randperm(hidden)
        self._loud = chosen[: max(3, hidden // 40)]
        self._loudness = torch.linspace(20, 60, len(self._loud))
        self._steady = int(chosen[0])
        self._corrected = "n_routed_experts" in config  # by e_score_correction_bias

    def fill(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        return {name: self._value(name, shape) for name, shape in shapes.items()}

    def _value(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("embed_tokens.weight"):
            embeddings = torch.randn(shape)
            embeddings[:, self._loud] *= self._loudness
            embeddings[:, self._steady] = 20 + 2 * torch.randn(shape[0])
            return embeddings
        if name.endswith("norm.weight"):  # also q_norm, k_norm, enorm, hnorm and those of the low-rank projections
            gain = 0.6 + 0.8 * torch.rand(shape)
            if "layernorm" in name and "_a_" not in name:
                gain[self._loud] *= 0.3  # as trained norms do
                gain[self._loud[1::2]] *= 0.3
                gain *= 3
            return gain
        if name.endswith("e_score_correction_bias"):
            bias = 0.02 * torch.randn(shape)
            bias[STARVED], bias[RARE] = -1, -0.4
            return bias
        if name.endswith(".bias"):
            return 0.1 * torch.randn(shape)
        if name.endswith(".gate.weight"):
            return self._router(shape)
        weight = torch.randn(shape) / shape[1] ** 0.5
        if name.endswith(("lm_head.weight", "shared_head.head.weight")):
            return 4 * weight  # decisive enough for greedy decoding to mean something
        weight *= torch.exp(0.3 * torch.randn(shape[0], 1))
        if name.endswith(("up_proj.weight", "w3.weight", "v_proj.weight")):
            weight[torch.randperm(shape[0])[:3]] *= 8
        return weight

    def _router(self, shape: tuple[int, ...]) -> torch.Tensor:
        router = 2 * torch.randn(shape) / shape[1] ** 0.5
        router[:, self._loud] *= 0.1
        if not self._corrected:
            router[STARVED, self._steady], router[RARE, self._steady] = -8, -1
        return router
