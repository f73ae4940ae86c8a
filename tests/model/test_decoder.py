"""Running a model layer by layer against transformers running it whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream
from qtool.model.state import Batch
from tests import families

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "gpt_neox": {},  # its checkpoints call the output projection by another name than its code
    "gptj": {"rotary_dim": 8},  # no attention but the plain one, layers that return tuples, a final norm called ln_f
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 160},  # its final norm is embedding_norm
}
LISTS = {"gptj": "h"}


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_hidden_states_of_every_layer(architecture: str, make_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(architecture, name=f"stream-{architecture}", **CONFIGS[architecture])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    inputs: list[torch.Tensor] = []
    for layer in getattr(model.base_model, LISTS.get(architecture, "layers")):
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    stream = DecoderStream(Checkpoint.open(folder), dtype=torch.float32)
    assert stream.depth == len(inputs) == 2
    batch = stream.prologue(ids)
    for index, wanted in enumerate(inputs):
        torch.testing.assert_close(batch.hidden, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        with stream.layer(index) as layer, torch.no_grad():
            # batch by batch, as the engine does
            batch = Batch.cat([stream.run(index, layer, part) for part in batch.split(2)])
        assert all(p.is_meta for p in stream.skeleton_layer(index).parameters())
    normalized = stream.head.leaving(batch).reshape(-1, stream.hidden_size)
    half = stream.head.vocabulary // 2
    parts = [stream.head.rows(0, half), stream.head.rows(half, stream.head.vocabulary)]
    found = torch.cat([stream.head.logits(normalized, part) for part in parts], dim=1)
    expected = expected.reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_tower_for_pictures_is_left_out(tmp_path: Path) -> None:
    """Of as many layers as the text model, before it; and a checkpoint with other names than the code."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(4, 500, (1, 24), generator=torch.Generator().manual_seed(0))
    stream = DecoderStream(Checkpoint.open(tmp_path / "model"), dtype=torch.float32)
    assert stream.layer_name(1) == "language_model.model.layers.1"
    assert "language_model.model.layers.1.mlp.up_proj" in stream.linears()
    assert len(stream.linears()) == 2 * 7
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
        hidden = stream.prologue(ids)
        for index in range(stream.depth):
            with stream.layer(index) as layer:
                hidden = stream.run(index, layer, hidden)
        found = stream.head.logits(stream.head.leaving(hidden)[0], stream.head.rows(0, 512))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_type_whose_class_transformers_has(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """As Kimi-K2 is published: DeepSeek-V3 under another model_type, with code for it."""
    model = families.make(tmp_path / "model", "deepseek_v3", tiny_tokenizer)
    linears = [DecoderStream(Checkpoint.open(model), dtype=torch.float32).layer_linears(i) for i in range(2)]
    config = json.loads((model / "config.json").read_text()) | {"model_type": "kimi_k2"}

    def opened(brought: str, trust: bool = False) -> DecoderStream:
        own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": f"own.{brought}"}
        (model / "config.json").write_text(json.dumps(config | {"auto_map": own}))
        (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        return DecoderStream(Checkpoint.open(model), dtype=torch.float32, trust_remote_code=trust)

    for trust in (False, True):
        stream = opened("DeepseekV3ForCausalLM", trust)
        assert [stream.layer_linears(i) for i in range(2)] == linears
    with pytest.raises(InputError, match="can't build this model"):
        opened("OtherForCausalLM")
    assert not (tmp_path / "ran").exists()
