"""Running a model layer by layer against transformers running it whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import InputError
from qtool.model.decoder import DecoderStream

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
    "gpt_neox": {},
}


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_hidden_states_of_every_layer(architecture: str, make_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(architecture, name=f"stream-{architecture}", **CONFIGS[architecture])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    inputs: list[torch.Tensor] = []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    stream = DecoderStream(Checkpoint.open(folder), dtype=torch.float32)
    assert stream.depth == len(inputs) == 2
    hidden = stream.prologue(ids)
    for index, wanted in enumerate(inputs):
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        with stream.layer(index) as layer, torch.no_grad():
            # batch by batch, as the engine does
            hidden = torch.cat([stream.run(index, layer, part) for part in hidden.split(2)])
        assert all(p.is_meta for p in stream.skeleton_layer(index).parameters())
    normalized = stream.head.normalize(hidden).reshape(-1, hidden.shape[-1])
    half = stream.head.vocabulary // 2
    parts = [stream.head.rows(0, half), stream.head.rows(half, stream.head.vocabulary)]
    found = torch.cat([stream.head.logits(normalized, part) for part in parts], dim=1)
    expected = expected.reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_positions_that_are_added_to_the_embeddings_are_refused(tiny_llama: Path) -> None:
    stream = DecoderStream(Checkpoint.open(tiny_llama), dtype=torch.float32)

    def add(_model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"] + torch.linspace(0, 1, 8)[:, None]}

    stream._skeleton.base.register_forward_pre_hook(add, with_kwargs=True)
    with pytest.raises(InputError, match=r"LlamaForCausalLM has more .*adds something to the embeddings"):
        stream.prologue(torch.arange(8)[None])
