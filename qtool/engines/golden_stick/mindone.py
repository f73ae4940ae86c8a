"""MindOne's models for Golden Stick: the ones that mindspore-gs 1.4.1 ships, and those that we register."""

from __future__ import annotations

from typing import Any

SHIPPED = ("qwen3", "glm4v", "qwen3_vl")
_REGISTERED = {
    "llama": ("LlamaForCausalLM", "LlamaDecoderLayer"),
    "mistral": ("MistralForCausalLM", "MistralDecoderLayer"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2DecoderLayer"),
}
MODEL_TYPES = (*SHIPPED, *_REGISTERED)
"""The values of config.json's model_type that can be quantized through MindOne."""


def register() -> None:
    """Tell mindspore-gs about the decoders that have Qwen3's layout: same names, same four groups to smooth."""
    import importlib

    from mindspore_gs.ptq.models.mindone_models.mindone_model import MindOneModel

    for model_type, (model, layer) in _REGISTERED.items():
        module = importlib.import_module(f"mindone.transformers.models.{model_type}.modeling_{model_type}")
        MindOneModel.reg_model(model_type)(_like_qwen3(getattr(module, model), getattr(module, layer)))


def _like_qwen3(model: Any, decoder_layer: type) -> type:
    import mindspore
    from mindspore_gs.ptq.models.mindone_models.qwen3 import Qwen3

    class Decoder(Qwen3):
        def __init__(self, model_path: str) -> None:
            self.network = model.from_pretrained(
                model_path,
                mindspore_dtype=mindspore.bfloat16,
                _attn_implementation="flash_attention_2",
                use_cache=False,
            )
            self._original_sf_path = model_path
            self.num_attention_heads, self.num_key_value_heads = self._get_gqa_info(model_path)
            self.is_gqa = self.num_key_value_heads != self.num_attention_heads

        def _transformer_layers(self) -> list[type]:
            return [decoder_layer]

    return Decoder
