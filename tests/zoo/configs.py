"""Small configurations of transformers' own model types: the fields' usual names say what to shrink, a table the rest.

A list with one entry per layer keeps at least one entry of each of its kinds, and says how many layers there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

ENTRIES = 416  # of the vocabulary; the last ones are no text
MARKS = range(400, ENTRIES)  # ids for pictures and sound, which no text has

# The first pattern that matches a field's whole name gives its value, where the default is a whole number.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(text_)?vocab_size|vocab_size_per_layer_input|decoder_vocab_size", ENTRIES),
    (r"hidden_size_per_layer_input", 32),
    (r"input_embedding_size|output_embedding_size|embedding_size|embedding_dim|emb_dim|word_embed_proj_dim", 64),
    (r"(.*_)?hidden_size|hidden_dim|d_model|n_embd|dim|embed_dim|lru_width|attention_hidden_size|out_hidden_size", 64),
    (r"moe_shared_expert_intermediate_size|shared_expert_intermediate_size|shared_intermediate_size", 48),
    (r"moe_intermediate_size|expert_ffn_hidden_size", 48),
    (r"intermediate_multiple_size", 2),
    (r"(.*_)?intermediate_size.*|(.*_)?ffn_dim|ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size|mlp_dim", 96),
    (r"(num_hidden_layers|n_layers?|num_layers|num_blocks|num_encoder_layers|num_decoder_layers)", 2),
    (r"(encoder|decoder)_layers|depth|num_layers_per_stack", 2),
    (r"num_key_value_heads|num_kv_heads", 2),
    (r".*attention_heads|n_heads?|num_heads|attention_heads", 4),
    (r"attention_head_dim|attention_head_size|d_head|dim_head|head_dim|head_size|kv_channels", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|original_max_position_embeddings", 256),
    (r"max_source_positions|max_target_positions", 256),
    (r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token", 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 8),
    (r"zero_expert_num", 1),
    (r"n_group|topk_group|pretraining_tp", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers", 0),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank", 32),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim", 16),
    (r"index_n_heads", 4),
    (r"o_groups", 2),
    (r"rotary_dim", 16),
    (r"sliding_window|attention_window_size|window_size|attention_chunk_size|local_attention", 32),
    (r"laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank", 32),
    (r"router_hidden_size", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_ssm", 128),
    (r"mamba_d_state|ssm_state_size|state_size", 16),
    (r"time_step_rank|mamba_dt_rank", 8),
    (r"mamba_chunk_size|chunk_size", 16),
    (r"mamba_n_groups|mamba_ngroups", 1),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", 16),
    (r"linear_num_heads", 4),
    (r"num_codebooks", 2),
    (r"image_size", 32),
    (r"(temporal_)?patch_size", 8),
    (r"query_pre_attn_scalar", 16),
)
# Names of fields that are lists with one entry per layer.
_PER_LAYER = (
    r"layer_types|mlp_layer_types|indexer_types|no_rope_layers|layer_rope_theta|layers_block_type|attention_layers|"
    r"activation_sparsity_pattern|intermediate_size|attn_layers"
)
_MOST = 4  # layers
QUERIES = 4  # of Kosmos-2: as many places of a text are pictures

# model_type -> what its configuration needs besides; `depth` is the number of layers.
_DECODER = {"is_decoder": True}
_FOUR_HEADS = {"num_key_value_heads": 4}
_SAME = {"head_dim": 16}


def _mrope(sections: list[int], **others: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **others}
    return {"rope_parameters": rope, "head_dim": 16}


SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_linear",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        _FOUR_HEADS,
    ),
    **dict.fromkeys(
        ("glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
        _mrope([2, 3, 3]),
    ),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _SAME),
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 500,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260, "hidden_size_global": 64},
        "decoder_config": {"vocab_size": 260, "hidden_size_global": 64},
    },
    "chameleon": {"vocabulary_map": {"<image>": 400}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: _mrope([3, 3, 2])["rope_parameters"] for kind in ("full_attention", "sliding_attention")
        },
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64, "ffn_hidden_size": 96},
    },
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"], "topk_method": "greedy"},
    "deepseek_ocr2_sam_vision_model": {"image_size": 64, "window_size": 4, "output_channels": 16, "mlp_dim": 64},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision", "hidden_size": 64, "num_hidden_layers": 2}},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "blip-2": {"image_token_index": 400},
    "instructblip": {"image_token_index": 400},
    "instructblipvideo": {"video_token_index": 400},
    "emu3": {
        "vocabulary_map": {"<image>": 400, "<|extra_200|>": 401},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []},
    },
    "ernie4_5_moe": {"moe_layer_end_index": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 48], **_mrope([3, 3, 2])},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gemma4_unified": {"vision_config": {}},
    "glm4v_moe_text": _mrope([1, 1, 2], partial_rotary_factor=0.5),
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "index_topk": 64},
    "granite4_vision": {
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "2/4",
    },
    "hunyuan_vl_text": _mrope([2, 2, 2, 2]),
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"intermediate_size": 48},
    **{f"granitemoe{rest}": {"intermediate_size": 48} for rest in ("", "_swa", "shared", "hybrid")},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "intermediate_size": 96,
    },
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 64},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "jetmoe": {"intermediate_size": 96, "kv_channels": 16, "num_key_value_heads": 4},
    "kosmos-2": {"latent_query_num": QUERIES},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {
        "moe_layers": ...,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "intermediate_size": 48,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "llama4_vision_model": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mistral4": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        },
    },
    "modernbert-decoder": {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron": {"num_key_value_heads": 2},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 64}}},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 64,
    },
    "qwen2_moe": {"mlp_only_layers": [0], "num_hidden_layers": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
    },
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_vocab_size": 40,
        "shape_vocab_size": 40,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 32,
        "num_hidden_layers": 2,
        "share_expert_dim": 32,
        "num_sliding_attention_heads": 4,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "num_query_groups": ...,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Why a type that transformers lists isn't here: its text part doesn't run by itself, or it can't be built.
TEXT_ALONE = ("fuyu",)  # of these the text model is here, though pictures would need more
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        ("pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), "an encoder-decoder"
    ),
    "evolla": "it reads proteins, and transformers' own class for this task refuses its configuration",
    "musicgen": "made of three models, of which none is built from a configuration alone",
    "musicgen_melody": "made of three models, of which none is built from a configuration alone",
    "gemma4_assistant": "drafts for another model, and doesn't run without that",
    "gemma4_unified_assistant": "drafts for another model, and doesn't run without that",
    "pi0": "moves a robot: it makes actions, not tokens",
}
# Why a type is refused, in more words than the message has.
ARGUED: dict[str, str] = {
    "blt": "groups of bytes, which another model finds, come between its three stacks of layers, which run in turn",
    "diffusion_gemma": "its layers run twice with the same weights, as encoder and as decoder, on different inputs",
    "hrm_text": "its two stacks of layers run several times in turn: what a layer gets depends on layers behind it",
    "idefics": "transformers runs it only with a picture in every forward",
    "jetmoe": "its attention is a mixture of experts too, each with one matrix before it and one behind; no runtime "
    "that qtool knows reads such experts as integers",
    "xlm": "attention, norms and feed-forward are in a list each: there is no list of layers to run one by one",
}
# As what transformers saves them isn't a causal LM: the type is among the models of pictures and text, whole.
TEXT_OF_PICTURES = ("emu3", "mllama")
_PIXELS = ("samples", 3, 32, 32)
INTERLEAVED = ("gpt_oss", "inkling_mm_model")  # rows of gate and up take turns in the files
# transformers doesn't find these under the names that it saves them with, but without the first "model.".
PREFIXED = ("shieldgemma2",)
# What a model wants besides text: shapes of random numbers; a mask is zeros where no picture is.
INPUTS: dict[str, dict[str, tuple[str | int, ...]]] = {
    "blip": {"pixel_values": _PIXELS},
    "blip-2": {"pixel_values": _PIXELS},
    "idefics": {"pixel_values": ("samples", 1, 3, 32, 32), "image_attention_mask": ("samples", "length", 1)},
    "instructblip": {"pixel_values": _PIXELS, "qformer_input_ids": ("samples", 8)},
    "instructblipvideo": {"pixel_values": ("samples", 4, 3, 32, 32), "qformer_input_ids": ("samples", 8)},
    "kosmos-2": {"pixel_values": _PIXELS, "image_embeds_position_mask": ("samples", "length")},
}


def settings(default: Any, sub: bool = False) -> dict[str, Any]:
    """What to make a small configuration from.

    Args:
        default: transformers' configuration of the type, with its defaults.
    """
    content = default.to_dict()
    found: dict[str, Any] = {}
    depth, kept = _layers(content)
    subs = getattr(type(default), "sub_configs", {}) or {}
    marks = iter(MARKS)
    for name, value in content.items():
        if name in subs or name in ("model_type", "transformers_version", "architectures", "rope_parameters"):
            continue
        if isinstance(value, list) and kept is not None and len(value) == depth and re.fullmatch(_PER_LAYER, name):
            entries = [value[i] for i in kept]
            found[name] = [96 for _ in entries] if name == "intermediate_size" else entries
        elif isinstance(value, int) and not isinstance(value, bool):
            if re.fullmatch(
                r"(pad|bos|eos|sep|cls|unk|decoder_start|mask|forced_.os)_token_id|(pad|bos|eos)_index", name
            ):
                found[name] = 0 if name.startswith(("bos", "decoder", "unk")) else 1
            elif re.search(r"token_(id|index)$", name):
                found[name] = next(marks)
            elif (size := _size(name)) is not None:
                found[name] = min(size, value) if name == "num_nextn_predict_layers" else size
            if "key_value_heads" in name and value == 1:
                found[name] = 1
    if kept is not None:
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in content and isinstance(content[name], int):
                found[name] = len(kept)
    for name, kind in subs.items():
        part = getattr(default, name, None)
        if part is None:
            try:
                part = kind()
            except Exception:  # a part that some model of the type goes without
                continue
        found[name] = settings(part, sub=True)
        if found[name] is not None and not hasattr(kind, "from_pretrained"):
            del found[name]
        elif "model_type" in part.to_dict():
            found[name]["model_type"] = part.model_type
    if (sections := (content.get("rope_parameters") or {}).get("mrope_section")) is not None:
        found["rope_parameters"] = {**content["rope_parameters"], "mrope_section": _sections(sections, content)}
    changes = SPECIAL.get(default.model_type, {})
    return merged(found, changes)


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes in place of what is there, in parts as well; None as a change of a part takes it out."""
    result = dict(settings)
    for name, value in changes.items():
        inner = result.get(name)
        result[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return {name: value for name, value in result.items() if value is not ...}


def _sections(sections: list[int], content: dict[str, Any]) -> list[int]:
    """Of a rotary embedding of 16 channels per head, in the proportions of the default."""
    share = (content.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    half = int(16 * share) // 2
    first = max(1, round(half * sections[0] / sum(sections)))
    second = (half - first) // 2
    return [first, second, half - first - second]


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _layers(content: dict[str, Any]) -> tuple[int, list[int] | None]:
    """(the default number of layers, which of them have at least one of each kind)."""
    lists = [v for k, v in content.items() if isinstance(v, list) and v and re.fullmatch(_PER_LAYER, k)]
    if not lists:
        return 0, None
    depth = len(max(lists, key=len))
    lists = [each for each in lists if len(each) == depth]
    kept: list[int] = []
    for each in lists:
        for i, kind in enumerate(each):
            if isinstance(kind, float) or (isinstance(each[0], int) and each[0] > 1):
                continue  # numbers: no kinds
            if all(each[k] != kind for k in kept):
                kept.append(i)
    kept = sorted(kept)[:_MOST]
    for extra in range(depth):
        if len(kept) >= 2:
            break
        if extra not in kept:
            kept.append(extra)
    return depth, sorted(kept)


def kinds() -> Iterator[tuple[str, str]]:
    """("text" or "image", model type) of everything that the zoo holds, in transformers' order."""
    from transformers.models.auto import modeling_auto as auto

    for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield "text", name
    for name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        yield "image", name
