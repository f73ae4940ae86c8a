"""A tiny model of every family that a recipe ships for, quantized by plain rounding as its recipe says."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qtool.checkpoint import formats
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import CheckpointWriter, Sharding
from qtool.quant.types import QuantizedLinear
from qtool.recipe.load import match
from tests import families
from tests.checkpoint.conftest import round_layer

# architecture -> what `families.make` is asked for; the others are made here
_MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV3ForCausalLM": ("deepseek_v3", {"num_nextn_predict_layers": 0}),
    "Glm4MoeForCausalLM": ("glm4_moe", {"num_nextn_predict_layers": 0}),
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("llama", {"sliding_window": None}),
    "MixtralForCausalLM": ("mixtral", {}),
    "Qwen2ForCausalLM": ("llama", {"num_attention_heads": 6, "attention_bias": True}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {}),
}
_RENAMED = {"MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
ARCHITECTURES = (*_MADE, "Glm4vForConditionalGeneration", "TeleChat2ForCausalLM")


def make(architecture: str, folder: Path, tokenizer: Any) -> Path:
    """A random bfloat16 model."""
    if architecture in _MADE:
        model_type, changes = _MADE[architecture]
        made = families.make(folder, model_type, tokenizer, architectures=[architecture], **changes)
        if architecture == "Qwen2ForCausalLM":  # whose o_proj has no bias
            families.save(
                {name: t for name, t in families.load(made).items() if not name.endswith("o_proj.bias")}, made
            )
        if (later := _RENAMED.get(architecture)) is not None:  # the same tensors in a model of another type
            config = json.loads((made / "config.json").read_text())
            config.pop("attention_bias", None)  # Llama's; no other has the key
            (made / "config.json").write_text(json.dumps(config | {"model_type": later}))
        return made
    return {"Glm4vForConditionalGeneration": _glm4v, "TeleChat2ForCausalLM": _telechat2}[architecture](
        folder, tokenizer
    )


def schemes(model: Path) -> tuple[str, ...]:
    """Those of its recipe."""
    return tuple(match(Checkpoint.open(model).config)[0].schemes)


def quantize(
    source: Path, target: Path, format: str, scheme: str, sharding: Sharding | None = None
) -> dict[str, QuantizedLinear]:
    """By the scheme of the model's recipe; static layers get one input scale. Returns the layers."""
    checkpoint, form = Checkpoint.open(source), formats.get(format)
    recipe, _ = match(checkpoint.config)
    layers = formats.of(checkpoint).layers(checkpoint)
    made: dict[str, QuantizedLinear] = {}
    with CheckpointWriter(target, form, sharding=sharding) as writer:
        writer.expect(checkpoint.names)
        for tensor in checkpoint.names:
            owner, _, part = tensor.rpartition(".")
            policy = recipe.policy(scheme, owner) if owner in layers and "embed" not in owner else None
            policy = policy and policy.settled(form.expresses)
            if policy is None:
                writer.add(tensor, checkpoint.tensor(tensor))
            elif part == "weight":
                static = policy.scheme.is_static
                rounded = round_layer(
                    checkpoint.tensor(tensor),
                    checkpoint.tensor(f"{owner}.bias") if f"{owner}.bias" in checkpoint else None,
                    (form.storable_scale(0.05, torch.bfloat16), 11) if static else None,
                    partial(form.storable_weight_scale, scheme=policy.scheme, dtype=torch.bfloat16),
                )
                made[owner] = dataclasses.replace(rounded, scheme=policy.scheme)
                writer.add_linear(owner, made[owner], torch.bfloat16)
        writer.finish(checkpoint, checkpoint.config, {"made_by": "a test"})
    return made


def _save(tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path, tokenizer: Any) -> Path:
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


def _glm4v(folder: Path, tokenizer: Any) -> Path:
    from transformers import AutoModelForImageTextToText
    from transformers.models.glm4v import Glm4vConfig

    text = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
    vision |= {"image_size": 56, "patch_size": 14}
    config = Glm4vConfig(text_config=text, vision_config=vision, dtype="bfloat16")
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _telechat2(folder: Path, tokenizer: Any) -> Path:
    """By the names and shapes of TeleChat2-7B's own modeling_telechat2.py, which transformers doesn't have."""
    folder.mkdir(parents=True)
    hidden, ffn, heads, kv_heads, words, layers = 64, 160, 2, 2, len(tokenizer), 2
    config = {
        "architectures": ["TeleChat2ForCausalLM"],
        "model_type": "telechat",
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "n_head": heads,
        "num_key_value_heads": kv_heads,
        "n_layer": layers,
        "vocab_size": words,
        "seq_length": 512,
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"transformer.word_embeddings.weight": random(words, hidden), "lm_head.weight": random(words, hidden)}
    tensors["transformer.ln_f.weight"] = torch.ones(hidden)
    width = hidden // heads
    for i in range(layers):
        layer = f"transformer.h.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": torch.ones(hidden),
            f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}.self_attention.query.weight": random(hidden, hidden),
            f"{layer}.self_attention.key_value.weight": random(2 * kv_heads * width, hidden),
            f"{layer}.self_attention.dense.weight": random(hidden, hidden),
            f"{layer}.self_attention.dense.bias": random(hidden),
            f"{layer}.mlp.gate_proj.weight": random(ffn, hidden),
            f"{layer}.mlp.up_proj.weight": random(ffn, hidden),
            f"{layer}.mlp.down_proj.weight": random(hidden, ffn),
            f"{layer}.mlp.down_proj.bias": random(hidden),
        }
    return _save(tensors, config, folder, tokenizer)
