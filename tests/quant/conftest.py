"""Single decoder layers of several architectures, as transformers itself calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 8},
    "olmo2": {},
    "phi": {},
    "phi3": {"sliding_window": 8},
    "gpt_neox": {},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices this small take longer on two threads, far longer when something else runs as well."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Layer:
    """The second decoder layer of a model, in float32.

    Attributes:
        module: the layer.
        run: calls it on the hidden states that reach it, and returns its output.
    """

    architecture: str
    module: nn.Module
    run: Callable[[], torch.Tensor]


@pytest.fixture(scope="session")
def decoder_layer(make_model: Callable[..., Path]) -> Callable[[str], Layer]:
    """decoder_layer(architecture) -> a fresh Layer, fit to be changed."""
    loaded: dict[str, tuple[nn.Module, tuple[Any, Any]]] = {}

    def load(architecture: str) -> tuple[nn.Module, tuple[Any, Any]]:
        from transformers import AutoModelForCausalLM

        folder = make_model(architecture, name=f"one-{architecture}", **ARCHITECTURES[architecture])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        layer = model.base_model.layers[1]
        calls: list[tuple[Any, Any]] = []
        handle = layer.register_forward_pre_hook(lambda _m, a, k: calls.append((a, k)), with_kwargs=True)
        ids = torch.randint(4, 500, (2, 24), generator=torch.Generator().manual_seed(1))
        model(ids, use_cache=False)
        handle.remove()
        return layer, calls[0]

    def make(architecture: str) -> Layer:
        if architecture not in loaded:
            loaded[architecture] = load(architecture)
        original, (args, kwargs) = loaded[architecture]
        layer = copy.deepcopy(original)

        @torch.no_grad()
        def run() -> torch.Tensor:
            out = layer(*args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        return Layer(architecture, layer, run)

    return make
