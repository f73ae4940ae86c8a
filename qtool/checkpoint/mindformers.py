"""DeepSeek-V3 under the names of MindFormers' older models, seen under Hugging Face's.

Golden Stick used to quantize MindFormers' model as it was, and its checkpoints have that model's names: q2l_proj,
kv2l, lkv2kv, feed_forward.w1, routed_experts.ffn, quant_op.input_zp, dequant_scale. MindFormers 1.7.0 loads them beside
today's (models/deepseek3/modeling_deepseek_v3_infer.py, convert_name); this is the same translation, to the names of
the other end. Tensors are as they are under today's names: one for each expert, [out, in].

Still older ones hold all experts in one tensor, and the rotary rows of queries and keys in another order
(vLLM-MindSpore 0.3, deepseekv3_weight_processor.py, "osl"). MindFormers 1.7.0 doesn't load those, and qtool refuses
them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qtool.checkpoint.header import TensorInfo
from qtool.errors import InputError

_MARK = re.compile(r"\.layers\.\d+\.(attention\.(q2l_proj|l2q_proj|kv2l|wo)|feed_forward)\.")
_STACKED = re.compile(r"\.(lkv2kv_k_nope|lkv2kv_v|qkv2l|w_gate_hidden|routed_experts\.ffn\.w[123])(\.|$)")

# In this order: what comes first may make what comes later match.
_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^model\.tok_embeddings\.embedding_weight$", "model.embed_tokens.weight"),
        (r"^model\.norm_out\.", "model.norm."),
        (r"\.attention\.q2l_proj\.quant_op\.beta$", ".input_layernorm.bias"),
        (r"\.attention\.l2q_proj\.quant_op\.beta$", ".self_attn.q_a_layernorm.bias"),
        (r"\._layer\.|\.matmul\.|\.quant_op\.", "."),
        (r"\.attention\.", ".self_attn."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.q2l_proj\.", ".q_a_proj."),
        (r"\.lq_norm\.", ".q_a_layernorm."),
        (r"\.l2q_proj\.", ".q_b_proj."),
        (r"\.kv2l\.", ".kv_a_proj_with_mqa."),
        (r"\.lkv_norm\.", ".kv_a_layernorm."),
        (r"\.lkv2kv\.", ".kv_b_proj."),
        (r"\.wo\.", ".o_proj."),
        (r"\.feed_forward\.", ".mlp."),
        (r"\.routed_experts\.router\.dense\.", ".gate."),
        (r"\.routed_experts\.router\.e_score_correction_bias$", ".gate.e_score_correction_bias"),
        (r"\.routed_experts\.ffn\.", ".experts."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w2\.", ".down_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.dequant_scale$", ".deq_scale"),
        (r"\.input_zp$", ".input_offset"),
        (r"\.w_scale$", ".weight_scale"),
        (r"\.w_offset$", ".weight_offset"),
    )
)
_TWICE = re.compile(r"\._layer\.matmul\.|\.quant_op\._layer\.")


def is_older(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether these are the names of MindFormers' older DeepSeek-V3."""
    return config.get("model_type") in ("deepseek_v3", "deepseekv3") and any(map(_MARK.search, names))


def current(name: str) -> str:
    """A tensor's name as Hugging Face has it; one that is so already stays."""
    name = _TWICE.sub(".", name)
    for pattern, replacement in _NAMES:
        name = pattern.sub(replacement, name)
    return name


def renamed(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
    """All tensors of such a checkpoint by today's names, in their order.

    What kv2l adds to its input is that of q2l_proj, whose it is to say: both read the same.

    Raises:
        InputError: experts in one tensor, or two tensors that would have one name.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if _STACKED.search(name):
            raise InputError(
                f"{name}: names of MindFormers before its models of 2025, with another order of rows; not read",
                where=where,
                hint="Newer quantizations of the model are on modelers.cn: qtool download deepseek-r1-0528-w8a8",
            )
        if name.endswith(".kv2l.quant_op.beta"):
            continue
        new = current(name)
        if new in found:
            raise InputError(f"{name} and {found[new].name} are both {new}", where=where)
        found[new] = info
    return {name: dataclasses.replace(info, name=name) for name, info in found.items()}
