"""Replaying a layer from a group of linears on gives what the whole layer would have given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtool.quant.exact.replay import Recording, Replay
from qtool.quant.product import INT8, QuantizedWeight

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FUSED = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
MODELS: dict[str, tuple[dict[str, Any], tuple[tuple[str, ...], ...]]] = {
    "llama": ({}, GROUPS),
    "qwen3": ({}, GROUPS),
    "gemma2": ({"query_pre_attn_scalar": 32}, GROUPS),
    "phi3": ({"pad_token_id": 0}, FUSED),
}


@pytest.fixture(scope="module", params=list(MODELS))
def layer_and_run(
    request: pytest.FixtureRequest, make_model: Callable[..., Path]
) -> tuple[nn.Module, Callable[[], torch.Tensor], tuple[tuple[str, ...], ...]]:
    from transformers import AutoModelForCausalLM

    config, groups = MODELS[request.param]
    folder = make_model(request.param, name=f"replay-{request.param}", **config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer = model.model.layers[1]
    captured: list[tuple[Any, Any]] = []
    handle = layer.register_forward_pre_hook(lambda _m, a, k: captured.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(4, 28)[None], use_cache=False)
    handle.remove()
    args, kwargs = captured[0]

    def run() -> torch.Tensor:
        with torch.no_grad():
            out = layer(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return layer, run, groups


@contextmanager
def noisy(layer: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Other weights in some linears."""
    weights = [layer.get_submodule(name).get_parameter("weight") for name in names]
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
        yield
        for weight, before in zip(weights, saved, strict=True):
            weight.copy_(before)


def test_replay_equals_the_whole_layer(
    layer_and_run: tuple[nn.Module, Callable[[], torch.Tensor], tuple[tuple[str, ...], ...]],
) -> None:
    layer, run, groups = layer_and_run
    before = run()
    recording = Recording(layer, run)
    assert torch.equal(recording.output, before)
    for names in groups:
        replay = Replay(recording, names)
        with noisy(layer, names):
            expected = run()
            results = {name: layer.get_submodule(name)(replay.x) for name in names}
        assert not torch.allclose(expected, before, rtol=1e-3)
        torch.testing.assert_close(replay(results), expected, rtol=1e-5, atol=1e-5)
        # flat results, as a matrix product gives them, and a second replay
        flat = {name: y.reshape(-1, y.shape[-1]) for name, y in results.items()}
        torch.testing.assert_close(replay(flat), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(run(), before)


def test_a_coarse_replay_errs_in_proportion_to_the_change(
    layer_and_run: tuple[nn.Module, Callable[[], torch.Tensor], tuple[tuple[str, ...], ...]],
) -> None:
    layer, run, groups = layer_and_run
    recording = Recording(layer, run)
    for names in groups:
        replay = Replay(recording, names)
        coarse = {
            name: QuantizedWeight.of(layer.get_submodule(name).get_parameter("weight").clone().detach(), INT8)
            for name in replay.later
        }
        for size in (1e-1, 1e-3):
            generator = torch.Generator().manual_seed(1)
            results = {}
            for name in names:
                y = layer.get_submodule(name)(replay.x)
                results[name] = y + size * y.std() * torch.randn(y.shape, generator=generator)
            change = replay(results) - replay.output
            error = replay(results, coarse) - replay.output - change
            assert error.norm() < 0.03 * change.norm() + 1e-6 * replay.output.norm()


def test_later_linears(
    layer_and_run: tuple[nn.Module, Callable[[], torch.Tensor], tuple[tuple[str, ...], ...]],
) -> None:
    layer, run, groups = layer_and_run
    recording = Recording(layer, run)
    for i, names in enumerate(groups):
        later = [name for group in groups[i + 1 :] for name in group]
        assert sorted(Replay(recording, names).later) == sorted(later)


def test_replay_skips_what_comes_before(
    layer_and_run: tuple[nn.Module, Callable[[], torch.Tensor], tuple[tuple[str, ...], ...]],
) -> None:
    layer, run, groups = layer_and_run
    replay = Replay(Recording(layer, run), groups[3])
    results = {name: layer.get_submodule(name)(replay.x) for name in groups[3]}
    assert products(lambda: replay(results)) == 0
    assert products(run) > 0
    assert not any("forward" in module.__dict__ for module in layer.modules())


def products(call: Callable[[], Any]) -> int:
    """How many matrix products there are while `call` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
                seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        call()
    return len(seen)
